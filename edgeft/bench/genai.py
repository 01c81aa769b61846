"""An ONNX package in onnxruntime-genai, which runs the graph by the package's genai_config.json.

Letters: P positions, S tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

from edgeft.bench.batched import BatchedSession, OneSlot
from edgeft.bench.genai_config import GenaiConfig
from edgeft.bench.session import Logits
from edgeft.errors import ModelError
from edgeft.text.chat import ChatTokenizer


class GenaiSession(BatchedSession):
    """`Session` over the package that holds the file `path`. `context` is the longest row in tokens.

    Texts are tokenised as the model was trained: what people write never becomes a control token.
    """

    runtime = "onnxruntime-genai"
    build = f"onnxruntime-genai {genai.__version__} (it does not tell its build flags)"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        chosen = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        try:
            config = genai.Config(str(path.parent))
            config.overlay(json.dumps(chosen))
            self._model = genai.Model(config)
        except Exception as error:  # its exceptions share no other base
            raise ModelError(f"onnxruntime-genai cannot load {path}: {error}", "export the package again") from error
        self.context_tokens = context
        self.text = ChatTokenizer.from_folder(path.parent)
        facts = GenaiConfig.of(path.parent)
        self.vocab_size, self.stop_ids = facts.vocab_size, facts.stop_ids
        self._single = GenaiRow(self._model, context)

    def close(self) -> None:
        """Give the graph and the caches back; the session is of no use afterwards."""
        del self._single, self._model

    def reset(self) -> None:
        super().reset()
        self._single.rewind(0)

    def append(self, ids: Sequence[int], num_past: int) -> Logits:
        return self._single.last(ids)

    def open_slots(self, prefix: Sequence[int], num_rows: int, longest: int) -> OneSlot:
        """One: its batches pad rows to equal length, and end them together."""
        return OneSlot(GenaiRow(self._model, longest), prefix)


class GenaiRow:
    """One row with its keys and values, of up to `length` tokens."""

    def __init__(self, model: Any, length: int) -> None:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, batch_size=1)
        self._generator = genai.Generator(model, parameters)

    def rewind(self, length: int) -> None:
        self._generator.rewind_to(length)

    def extend(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        """The logits [P, V] after the tokens whose numbers in `ids` are wanted."""
        self._generator.append_tokens(np.array([ids], np.int32))
        logits_SV = self._generator.get_output("logits")[0]
        logits_PV: Logits = logits_SV[list(wanted)].astype(np.float32, copy=False)
        return logits_PV

    def last(self, ids: Sequence[int]) -> Logits:
        """The logits [V] after the last token alone."""
        self._generator.append_tokens(np.array([ids], np.int32))
        logits: Logits = self._generator.get_logits()[0, -1]
        return logits
