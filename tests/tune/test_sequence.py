"""Learning what a teacher wrote, beside the labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate
from edgeft.tune.sequence import mix, weighted_loss

ROWS = [Encoded((1, 2, 3, 4 + n), (False, False, n % 2 == 0, True)) for n in range(5)]


def test_each_kind_gets_its_share_of_the_loss_and_one_without_a_share_is_left_out() -> None:
    rows, weights = mix(ROWS, 3, 0.75)
    assert rows == ROWS  # five tokens of labels, three of the teacher
    assert weights == pytest.approx([0.25 * 8 / 5] * 3 + [0.75 * 8 / 3] * 2)
    assert mix(ROWS, 3, 1.0) == (ROWS[3:], [1.0, 1.0])
    assert mix(ROWS, 3, 0.0) == (ROWS[:3], [1.0] * 3)
    tokens = [sum(row.trained) for row in ROWS]
    assert sum(w * n for w, n in zip(weights, tokens, strict=True)) == pytest.approx(sum(tokens))
    assert mix(ROWS[:4], 2, 0.5) == (ROWS[:4], [1.0] * 4)


def test_the_loss_of_a_row_counts_by_its_weight_and_so_does_its_gradient() -> None:
    batch, weights = collate(ROWS, 0), [0.5, 0.5, 0.5, 1.5, 0.0]
    logits = torch.randn(len(batch.labels_N), 12, dtype=torch.float64, requires_grad=True)
    per_token = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 1.5, 0.0, 0.0])  # two tokens of even rows, one of odd ones
    expected = (F.cross_entropy(logits, batch.labels_N, reduction="none") * per_token).sum()
    found = weighted_loss(logits, batch, ROWS, weights)
    assert float(found.detach()) == pytest.approx(float(expected.detach()))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
