"""A Hugging Face model folder in torch, computed in float32: the reference that every package is measured against.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from edgeft.bench.batched import BatchedSession, OneSlot
from edgeft.bench.session import Logits
from edgeft.formats.hf import load_model
from edgeft.text.chat import ChatTokenizer


class TorchSession(BatchedSession):
    """`Session` over the model folder that holds the file `path`. `context` is the longest row in tokens."""

    runtime = "torch"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = load_model(path.parent, torch.float32)
        self.build = (
            f"torch {torch.__version__} (float32, {torch.backends.cpu.get_cpu_capability()}), "
            f"transformers {version('transformers')}"
        )
        self.context_tokens = context
        self.vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        chat = ChatTokenizer.from_folder(path.parent)
        self.text, self.stop_ids = chat, chat.stop_ids
        self._single = TorchRow(self._model)

    def close(self) -> None:
        """Give the model and the cache back; the session is of no use afterwards."""
        del self._single, self._model

    def reset(self) -> None:
        super().reset()
        self._single.rewind(0)

    def append(self, ids: Sequence[int], num_past: int) -> Logits:
        logits: Logits = self._single.extend(ids, [len(ids) - 1])[0]
        return logits

    def open_slots(self, prefix: Sequence[int], num_rows: int, longest: int) -> OneSlot:
        """One: rows of different length would need padding, and a reference does without."""
        return OneSlot(TorchRow(self._model), prefix)


class TorchRow:
    """One row with its keys and values."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rewind(0)

    def rewind(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache()  # of all tokens, in sliding layers too: only such a cache can be cut anywhere
        elif too_many := self._cache.get_seq_length() - length:
            self._cache.crop(-too_many)

    @torch.inference_mode()
    def extend(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        """The logits [P, V] after the tokens whose numbers in `ids` are wanted."""
        kept = torch.tensor(list(wanted), dtype=torch.long)
        found = self._model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True, logits_to_keep=kept)
        logits_PV: Logits = np.asarray(found.logits[0].numpy(), np.float32)
        return logits_PV
