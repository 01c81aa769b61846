"""llama.cpp's model and KV cache as objects that free themselves, over llama-cpp-python's low-level calls.

Letters: P positions, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from edgeft.bench.session import Logits
from edgeft.errors import ModelError

BATCH_TOKENS = 2048  # most tokens of one llama_decode call
CELLS = 256  # llama.cpp makes room in these units, and aborts where there is less than one token per sequence
_LOG: deque[str] = deque(maxlen=40)


def _keep_log(level: int, text: bytes, user: object) -> None:
    _LOG.append(text.decode("utf-8", "replace"))


_LOG_CALLBACK = lib.llama_log_callback(_keep_log)  # must live as long as the library


@dataclass
class Tokens:
    """Tokens of one decode call: id, position, sequence, and whether the logits after it are wanted."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, sequence: int, wanted: Sequence[int] = ()) -> None:
        """Append `ids` at positions from `start`; `wanted` are positions, counted from the start of the row."""
        at = set(wanted)
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.sequences += [sequence] * len(ids)
        self.wanted += [i in at for i in range(start, start + len(ids))]


def piece(vocab: Any, token: int, special: bool) -> bytes:
    """The bytes that a token stands for; a control token has its spelling if `special`, else none."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        written = lib.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if written >= 0:
            return buffer.raw[:written]
        size = -written


class Model:
    """A loaded file; freed with the last object that uses it."""

    def __init__(self, path: Path, mmap: bool = True) -> None:
        lib.llama_log_set(_LOG_CALLBACK, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _LOG.clear()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_AUTO if mmap else lib.LLAMA_LOAD_MODE_NONE
        self.pointer: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelError(
                f"llama.cpp cannot load {path}: {' '.join(''.join(_LOG).split())[-300:]}",
                "export the package again, with an architecture that llama.cpp knows",
            )
        self.vocab: Any = lib.llama_model_get_vocab(self.pointer)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self.vocab)
        self.free = weakref.finalize(self, lib.llama_model_free, self.pointer)


class Context:
    """One KV cache of at least `cells` tokens shared by `sequences` sequences."""

    def __init__(self, model: Model, cells: int, sequences: int, threads: int, kv_type: int) -> None:
        cells = -(-cells // CELLS) * CELLS
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = cells, sequences, True
        params.n_batch = min(cells, BATCH_TOKENS)
        params.n_outputs_max_per_seq = 0  # as many logits of a sequence as its tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = kv_type
        if kv_type == lib.GGML_TYPE_F32:  # flash attention would round what the cache keeps
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.model, self.cells = model, cells
        self.pointer: Any = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise ModelError(
                f"llama.cpp cannot make a context of {cells} tokens: {' '.join(''.join(_LOG).split())[-300:]}",
                "use a smaller context",
            )
        self.free = weakref.finalize(self, lib.llama_free, self.pointer)
        self._memory: Any = lib.llama_get_memory(self.pointer)
        self._batch_tokens: int = lib.llama_n_batch(self.pointer)
        self._one = _Batch(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.int8))
        self._view: Logits = np.empty((0, 0), np.float32)

    def clear(self) -> None:
        lib.llama_memory_clear(self._memory, False)

    def share(self, source: int, sequence: int) -> None:
        """Let `sequence` begin with all tokens of `source`; the cells are shared, not copied."""
        lib.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)

    def drop(self, sequence: int, start: int = -1) -> None:
        """Forget a sequence, or its tokens from position `start` on."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def decode(self, tokens: Tokens) -> Logits:
        """Feed the tokens; returns the logits [P, V] of the wanted ones, in their order."""
        parts = [
            self._decode(tokens, at, min(at + self._batch_tokens, len(tokens.ids)))
            for at in range(0, len(tokens.ids), self._batch_tokens)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, self.model.vocab_size), np.float32), *parts])

    def decode_one(self, token: int, position: int) -> Logits:
        """Feed one token of the first sequence; returns the logits [V], which the next call writes over.

        Little is done beside llama_decode: a copy of the logits would cost 1% of a small model's step.
        """
        self._one.ids[0], self._one.positions[0] = token, position
        logits: Logits = self._run(self._one, 1)[0]
        return logits

    def _decode(self, tokens: Tokens, start: int, stop: int) -> Logits:
        batch = _Batch(
            np.array(tokens.ids[start:stop], np.int32),
            np.array(tokens.positions[start:stop], np.int32),
            np.array(tokens.sequences[start:stop], np.int32),
            np.array(tokens.wanted[start:stop], np.int8),
        )
        return self._run(batch, int(batch.wanted.sum())).copy()

    def _run(self, batch: _Batch, num_wanted: int) -> Logits:
        """Logits [num_wanted, V] in llama.cpp's own buffer, until the next run."""
        status = lib.llama_decode(self.pointer, batch.struct)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status}: {''.join(_LOG)[-300:]}")
        if not num_wanted:
            return np.empty((0, self.model.vocab_size), np.float32)
        found = lib.llama_get_logits(self.pointer)
        # llama.cpp keeps its buffer until it needs a larger one; making a new view costs more than reading the old one.
        same = ctypes.addressof(found.contents) == self._view.ctypes.data
        if not same or len(self._view) != num_wanted:
            self._view = np.ctypeslib.as_array(found, (num_wanted, self.model.vocab_size))
        return self._view


class _Batch:
    """Arrays, one entry per token, and llama.cpp's struct that points to them."""

    def __init__(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        wanted: NDArray[np.int8],
    ) -> None:
        self.ids, self.positions, self.wanted = ids, positions, wanted
        counts = np.ones(len(ids), np.int32)
        addresses = sequences.ctypes.data + sequences.itemsize * np.arange(len(ids), dtype=np.uintp)
        self._others = sequences, counts, addresses  # kept alive
        self.struct = lib.llama_batch(
            n_tokens=len(ids),
            token=_pointer(ids, ctypes.c_int32),
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(counts, ctypes.c_int32),
            seq_id=_pointer(addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wanted, ctypes.c_int8),
        )


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
