"""The learning-rate range test (Smith 2017, arXiv:1506.01186): a short run whose rate grows from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.batches import epoch_batches
from edgeft.tune.fit import LossFunction, Masters, training_step

SMOOTHING = 0.9  # of the running mean of the loss, as batches differ
DIVERGED = 3.0  # times the lowest smoothed loss


@dataclass(frozen=True)
class Point:
    """One step: its learning rate and the smoothed loss in nats per trained token."""

    lr: float
    loss: float


def range_test(
    trained: torch.nn.Module,
    lengths: Sequence[int],
    loss_of: LossFunction,
    settings: LoopSettings,
    low: float,
    high: float,
    steps: int,
    report: Reporter,
) -> list[Point]:
    """Train with rates from `low` to `high`, each step by the same factor; ends early where the loss runs away.

    The weights of `trained` are changed: throw them away.
    """
    masters, mean, points = Masters(trained, settings), 0.0, list[Point]()
    accelerator = Accelerator(cpu=next(trained.parameters()).device.type == "cpu")
    trained.train()
    with report.track("learning rates", steps) as bar:
        for step in range(steps):
            lr = low * (high / low) ** (step / max(1, steps - 1))
            epoch, position = divmod(step, math.ceil(len(lengths) / settings.batch_rows))
            rows = epoch_batches(lengths, settings.batch_rows, settings.seed, epoch)[position]
            loss, _ = training_step(accelerator, masters, rows, loss_of, settings.micro_rows, lr / settings.lr)
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            points.append(Point(lr, mean / (1 - SMOOTHING ** (step + 1))))
            bar.advance(1, loss=points[-1].loss, lr=lr)
            if not points[-1].loss <= DIVERGED * min(point.loss for point in points):  # also if it is not a number
                break
    return points


def suggestion(points: Sequence[Point]) -> float:
    """A peak rate for a whole run: half of the rate at which the smoothed loss was lowest.

    The smoothed loss lags behind, and where it turns the rate is already too high for long.
    """
    return min(points, key=lambda point: point.loss).lr / 2
