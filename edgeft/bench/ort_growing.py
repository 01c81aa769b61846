"""An ONNX package whose graph gives keys and values one longer than it was given, as optimum's exporter writes it.

Rows run one by one: the graph knows a row's length from what it is given. Letters as in `ort`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.bench.ort import DTYPES, PAST, PRESENT, OrtSession
from edgeft.bench.session import Logits


class _GrowingCache:
    """Keys and values of some rows, each as long as the row has become."""

    def __init__(self, empty: dict[str, NDArray[Any]], slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.rows = [dict(empty) for _ in range(slots)]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Let the row in slot `target` begin with the first tokens of the row in slot `source`."""
        self.rows[target] = cut(self.rows[source], num_tokens)


def cut(row: dict[str, NDArray[Any]], num_tokens: int) -> dict[str, NDArray[Any]]:
    """The first tokens of a row."""
    return {name: array[:, :, :num_tokens] for name, array in row.items()}


class GrowingSession(OrtSession):
    """`Session` over such a graph."""

    def _feed(self, cache: Any, slot: int, num_past: int, ids: Sequence[int]) -> Logits:
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, num_past + len(ids)), np.int64),
            **cut(cache.rows[slot], num_past),
        }
        if self._has_positions:
            feeds["position_ids"] = np.arange(num_past, num_past + len(ids))[None]
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, feeds), strict=True))
        cache.rows[slot] = {name.replace(PRESENT, PAST): v for name, v in found.items() if name.startswith(PRESENT)}
        logits: Logits = found["logits"][0].astype(np.float32, copy=False)
        return logits

    def _step_all(self, cache: Any, tokens: list[int], lengths: list[int]) -> Logits:
        if not tokens:
            return np.empty((0, self.vocab_size), np.float32)
        rows = zip(range(len(tokens)), lengths, tokens, strict=True)
        return np.concatenate([self._feed(cache, slot, length - 1, [token]) for slot, length, token in rows])

    def _make_cache(self, slots: int, length: int) -> Any:
        empty = {
            i.name: np.zeros((1, i.shape[1], 0, self._head_size), DTYPES[i.type])
            for i in self._session.get_inputs()
            if i.name.startswith(PAST)
        }
        return _GrowingCache(empty, slots, length)
