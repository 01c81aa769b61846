"""The range test finds a rate at which a known problem learns, and sees where it runs away."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.lr_range import Point, range_test, suggestion

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X @ torch.arange(6.0)


def points(high: float, steps: int = 60) -> list[Point]:
    torch.manual_seed(1)
    model = torch.nn.Linear(6, 1)

    def loss_of(rows: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        return ((model(X[list(rows)]).squeeze(1) - Y[list(rows)]) ** 2).sum(), len(rows), len(rows)

    settings = LoopSettings(batch_rows=8, warmup=0)
    return range_test(model, [5] * 64, loss_of, settings, 1e-4, high, steps, Reporter("test"))


def test_rates_grow_by_the_same_factor_from_the_first_to_the_last() -> None:
    found = points(high=1.0, steps=5)
    assert [point.lr for point in found] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_it_ends_where_the_loss_runs_away_and_suggests_less() -> None:
    found = points(high=1000.0)
    assert len(found) < 60
    assert found[-1].loss > 3 * min(point.loss for point in found)
    assert 0.02 < suggestion(found) < found[-1].lr / 2


def test_a_suggested_rate_learns() -> None:
    lr = suggestion(points(high=1000.0))
    model = torch.nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((model(X).squeeze(1) - Y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
