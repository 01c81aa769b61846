"""Batches of rows in an order that depends on the seed and the epoch alone.

B rows, P tokens of prefix, T tokens after it, N trained positions in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from edgeft.text.encode import Encoded
from edgeft.text.prefix import common_prefix


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, and what all of them begin with; only trained positions give logits."""

    prefix_P: torch.Tensor  # the tokens that every row starts with: computed once, not once per row; may be empty
    ids_BT: torch.Tensor
    attention_BT: torch.Tensor  # 1 for tokens, 0 for padding
    at_N: torch.Tensor  # index into the flattened [B * T] of each position that predicts a trained token
    labels_N: torch.Tensor  # the token to predict there

    @property
    def num_tokens(self) -> int:
        return int(self.attention_BT.sum())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row after the prefix."""
        return list(map(int, self.attention_BT.sum(1)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device) for t in (self.prefix_P, self.ids_BT, self.attention_BT, self.at_N, self.labels_N)))


def shared_tokens(rows: Sequence[Encoded]) -> int:
    """How many tokens all rows start with (the system message), none of them predicting a trained token."""
    return min(len(common_prefix([row.ids for row in rows])), *(trained_positions(row)[0] for row in rows))


def collate(rows: Sequence[Encoded], pad_id: int, prefix: int = 0) -> Batch:
    """Put rows of token ids into one batch; their first `prefix` tokens must be equal (`shared_tokens`)."""
    width = max(len(row.ids) for row in rows) - prefix
    ids_BT = torch.full((len(rows), width), pad_id)
    attention_BT = torch.zeros((len(rows), width), dtype=torch.long)
    at: list[int] = []
    labels: list[int] = []
    for b, row in enumerate(rows):
        own = len(row.ids) - prefix
        ids_BT[b, :own] = torch.tensor(row.ids[prefix:])
        attention_BT[b, :own] = 1
        for t in trained_positions(row):
            at.append(b * width + t - prefix)
            labels.append(row.ids[t + 1])
    return Batch(
        torch.tensor(rows[0].ids[:prefix], dtype=torch.long),
        ids_BT,
        attention_BT,
        torch.tensor(at),
        torch.tensor(labels),
    )


def trained_positions(row: Encoded) -> list[int]:
    """Positions whose logits predict a trained token."""
    return [t - 1 for t, trained in enumerate(row.trained) if trained]


def epoch_batches(lengths: Sequence[int], batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """All row numbers once, at random; the same for the same seed and epoch. Within a batch, short rows come first.

    Rows are not brought together by length: alike rows in one batch learn less from each step (benchmarks/LOG.md).
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [sorted(batch, key=lambda row: lengths[row]) for batch in in_parts(order, batch_rows)]


def in_parts(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The rows in order, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def ordered_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """All row numbers by length, in batches of at most `batch_tokens` padded tokens: for evaluation."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
