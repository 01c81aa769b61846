"""An ONNX package in plain onnxruntime: a graph with past and present keys and values that share one buffer.

Letters: B rows run together, S new tokens of a row, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgeft.bench.batched import SLOTS, BatchedSession, Part
from edgeft.bench.genai_config import GenaiConfig
from edgeft.bench.session import Logits
from edgeft.errors import ModelError
from edgeft.text.chat import ChatTokenizer

CACHE_BYTES = 1 << 29  # most memory of the batch's keys and values; long rows get fewer slots
PAST, PRESENT = "past_key_values.", "present."
DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class _Cache:
    """Keys and values of `slots` rows of up to `length` tokens; the graph extends them in place."""

    def __init__(self, session: ort.InferenceSession, head_size: int, slots: int, length: int) -> None:
        self._session, self.slots, self.length = session, slots, length
        self._arrays: dict[str, NDArray[Any]] = {
            i.name: np.zeros((slots, i.shape[1], length, head_size), DTYPES[i.type])
            for i in session.get_inputs()
            if i.name.startswith(PAST)
        }
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}

    def binding(self, first: int, stop: int) -> ort.IOBinding:
        """Inputs and outputs of the slots from `first` up to `stop`, bound to their memory."""
        if (first, stop) not in self._bindings:
            binding = self._session.io_binding()
            for name, array in self._arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[first:stop])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
            self._bindings[first, stop] = binding
        return self._bindings[first, stop]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let the row in slot `target` begin with the first tokens of the row in slot `source`."""
        for array in self._arrays.values():
            array[target, :, :num_tokens] = array[source, :, :num_tokens]


class OrtSession(BatchedSession):
    """`Session` over a graph as onnxruntime-genai's builder writes it. `context` is the longest row in tokens."""

    runtime = "onnxruntime"
    build = f"onnxruntime {ort.__version__}: {ort.get_build_info()}"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what goes wrong comes as an exception
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise ModelError(f"onnxruntime cannot load {path}: {error}", "export the package again") from error
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        # Graphs with fixed shapes take one token of one row, and a cache of one length (formats/onnx_variants.py).
        width = inputs["attention_mask"][1]
        self._fixed_context = width if isinstance(width, int) else None
        config = GenaiConfig.of(path.parent)
        self._head_size, self.stop_ids = config.head_size, config.stop_ids
        self.context_tokens = min(context, self._fixed_context or context)
        self.vocab_size = int(self._session.get_outputs()[0].shape[2])
        self.text = ChatTokenizer.from_folder(path.parent)
        self._single = self._make_cache(1, context)

    def close(self) -> None:
        """Give the graph and the caches back; the session is of no use afterwards."""
        del self._single, self._session

    def append(self, ids: Sequence[int], num_past: int) -> Logits:
        logits: Logits = self._feed(self._single, 0, num_past, ids)[-1]
        return logits

    def open_slots(self, prefix: Sequence[int], num_rows: int, longest: int) -> OrtSlots:
        """Slots for as many rows as memory allows, and one more for the prefix."""
        row_bytes = sum(
            i.shape[1] * self._head_size * longest * np.dtype(DTYPES[i.type]).itemsize
            for i in self._session.get_inputs()
            if i.name.startswith(PAST)
        )
        number = max(1, min(SLOTS, num_rows, CACHE_BYTES // row_bytes))
        return OrtSlots(self, self._make_cache(number + 1, longest), prefix)

    def _feed(self, cache: _Cache, slot: int, num_past: int, ids: Sequence[int]) -> Logits:
        """Feed tokens to one row; returns the logits [S, V] after each."""
        if self._fixed_context and len(ids) > 1:
            return np.concatenate([self._feed(cache, slot, num_past + n, [token]) for n, token in enumerate(ids)])
        lengths = np.array([num_past + len(ids)])
        logits: Logits = self._run(cache.binding(slot, slot + 1), np.array([ids], np.int64), lengths)[0]
        return logits

    def _step_all(self, cache: _Cache, tokens: list[int], lengths: list[int]) -> Logits:
        """Feed one token to each of the first rows, which have `lengths` tokens with it; returns [B, V]."""
        if not tokens:
            return np.empty((0, self.vocab_size), np.float32)
        if self._fixed_context:
            rows = zip(range(len(tokens)), lengths, tokens, strict=True)
            return np.concatenate([self._feed(cache, slot, length - 1, [token]) for slot, length, token in rows])
        binding = cache.binding(0, len(tokens))
        logits: Logits = self._run(binding, np.array(tokens, np.int64)[:, None], np.array(lengths))[:, 0]
        return logits

    def _run(self, binding: ort.IOBinding, ids_BS: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> Logits:
        # The graph reads only the number of ones in a row of the mask: rows of different length need no padding.
        ends = lengths_B[:, None]
        binding.bind_cpu_input("input_ids", ids_BS)
        width = self._fixed_context or lengths_B.max()
        binding.bind_cpu_input("attention_mask", (np.arange(width) < ends).astype(np.int64))
        if self._has_positions:
            binding.bind_cpu_input("position_ids", ends - ids_BS.shape[1] + np.arange(ids_BS.shape[1]))
        logits = np.empty((*ids_BS.shape, self.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(binding)
        return logits

    def _make_cache(self, slots: int, length: int) -> _Cache:
        return _Cache(self._session, self._head_size, slots, self._fixed_context or length)


class OrtSlots:
    """`Slots` as rows of one batch. Rows that run together are the first ones of the cache, and none is padded.

    A product with one row's new tokens is large enough: new rows are fed one by one, single steps together.
    """

    def __init__(self, session: OrtSession, cache: _Cache, prefix: Sequence[int]) -> None:
        self._session, self._cache, self._num_prefix = session, cache, len(prefix)
        self.number = cache.slots - 1
        self._prepared = 0  # so many places of the cache begin with the prefix, whatever comes after it
        self._order: list[int] = []  # the slot whose row is in each place from 0 on
        self._lengths: dict[int, int] = {}
        if prefix:
            session._feed(cache, self.number, 0, prefix)

    def begin(self, slot: int) -> None:
        place = len(self._order)
        if place == self._prepared:
            self._cache.copy(self.number, place, self._num_prefix)
            self._prepared += 1
        self._order.append(slot)
        self._lengths[slot] = self._num_prefix

    def feed(self, parts: Sequence[Part]) -> list[Logits]:
        places = {slot: place for place, slot in enumerate(self._order)}
        running = [p for p in parts if len(p.ids) == 1 and self._lengths[p.slot] > self._num_prefix]
        running.sort(key=lambda part: places[part.slot])
        together = running if [places[p.slot] for p in running] == list(range(len(running))) else []
        logits_BV = self._session._step_all(self._cache, [p.ids[0] for p in together], [p.start + 1 for p in together])
        found = {part.slot: logits_BV[n : n + 1] for n, part in enumerate(together)}
        for part in parts:
            if part.slot not in found:
                logits_SV = self._session._feed(self._cache, places[part.slot], part.start, part.ids)
                found[part.slot] = logits_SV[np.array(part.wanted) - part.start]
            self._lengths[part.slot] = part.start + len(part.ids)
        return [found[part.slot] for part in parts]

    def cut(self, slot: int, length: int) -> None:
        self._lengths[slot] = length  # what stands behind is never looked at, and written over

    def free(self, slot: int) -> None:
        """The last row moves to the place that becomes free."""
        place, last = self._order.index(slot), self._order.pop()
        if last != slot:
            self._cache.copy(len(self._order), place, self._lengths[last])
            self._order[place] = last
        del self._lengths[slot]


def open_graph(path: Path, threads: int, context: int) -> OrtSession:
    """The session for the graph of a package: one that extends keys and values in place, or one that gives longer ones.

    Raises ModelError if the package does not say which it is.
    """
    from edgeft.bench.ort_growing import GrowingSession

    return (OrtSession if GenaiConfig.of(path.parent).extends_in_place else GrowingSession)(path, threads, context)
