"""The loop: it learns, stops early, keeps the best weights, and a killed run ends as an unbroken one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from edgeft.errors import DataError
from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.fit import BETAS, CHECKPOINT, History, LossFunction, Masters, Plan, fit, overfitting
from edgeft.tune.validation import Validation

ROWS = 40
SETTINGS = LoopSettings(epochs=2, lr=0.15, batch_rows=4, evaluations=5, checkpoint_minutes=0, seed=3)
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
Y = X @ torch.arange(6.0)


class Killed(Exception):
    pass


def linear(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)).to(dtype)


def loss_of(model: torch.nn.Module, kill_at: int | None = None) -> LossFunction:
    calls = 0

    def loss(rows: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise Killed
        dtype = next(model.parameters()).dtype
        error = model(X[list(rows)].to(dtype)).squeeze(1) - Y[list(rows)].to(dtype)
        return (error**2).float().sum(), len(rows), len(rows)

    return loss


def validation(model: torch.nn.Module) -> Callable[[], Validation]:
    def loss() -> Validation:
        with torch.no_grad():
            model.eval()
            value = float(((model(X.to(next(model.parameters()).dtype)).squeeze(1).float() - Y) ** 2).mean())
            model.train()
        return Validation(value, 0.0)

    return loss


def run(
    model: torch.nn.Module, folder: Path, kill_at: int | None = None, settings: LoopSettings = SETTINGS
) -> tuple[dict[str, torch.Tensor], History]:
    return fit(model, [5] * ROWS, loss_of(model, kill_at), validation(model), settings, folder, Reporter("test"))


def test_training_lowers_the_loss_and_returns_the_best_weights(tmp_path: Path) -> None:
    model = linear()
    before = validation(model)().loss
    weights, history = run(model, tmp_path)
    best = min(e["loss"] for e in history.evals)
    assert best < before / 2
    model.load_state_dict(weights)
    assert validation(model)().loss == pytest.approx(best)
    assert [s["step"] for s in history.steps] == list(range(1, 21))


@pytest.mark.parametrize("kill_at", [1, 7, 20])
def test_a_killed_and_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, kill_at: int) -> None:
    expected, unbroken = run(linear(), tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(linear(), tmp_path / "killed", kill_at)
    weights, resumed = run(linear(), tmp_path / "killed")
    assert resumed == unbroken
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_holds_its_step_and_history(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(linear(), tmp_path, kill_at=6)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        record = file.metadata()
    assert record["step"] == "5"
    assert len(json.loads(record["history"])["steps"]) == 5


def test_it_stops_when_the_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    model = linear()
    values = iter([1.0, 2.0, 3.0, 0.1, 0.1])
    settings = SETTINGS.model_copy(update={"patience": 2})
    _, history = fit(
        model, [5] * ROWS, loss_of(model), lambda: Validation(next(values), 0.0), settings, tmp_path, Reporter("test")
    )
    assert history.stopped_early
    assert [e["loss"] for e in history.evals] == [1.0, 2.0, 3.0]
    assert history.best_step == history.evals[0]["step"]


def test_bf16_weights_learn_through_float32_masters(tmp_path: Path) -> None:
    """Steps far below the resolution of bf16 add up."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.constant_(model.weight, 1.0)

    def push(rows: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        return model.weight.sum() * len(rows), len(rows), len(rows)

    settings = LoopSettings(epochs=10, lr=1e-3, batch_rows=4, evaluations=1, warmup=0)
    weights, _ = fit(model, [5] * ROWS, push, lambda: Validation(0.0, 0.0), settings, tmp_path, Reporter("test"))
    assert weights["weight"].dtype == torch.float32
    assert 0.9 < float(weights["weight"]) < 0.99


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_a_step_is_that_of_torchs_adamw_on_clipped_gradients(clip_norm: float) -> None:
    model, theirs = linear().eval(), linear().eval()
    settings = SETTINGS.model_copy(update={"clip_norm": clip_norm, "weight_decay": 0.1})
    masters = Masters(model, settings)
    matrices = [{"params": [p for p in theirs.parameters() if (p.ndim > 1) == wide], "weight_decay": 0.1 * wide}
                for wide in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(matrices, lr=settings.lr, betas=BETAS)
    versions = [p._version for p in model.parameters()]
    for _ in range(3):
        (model(X)[:, 0] - Y).square().sum().backward()
        masters.step(lr_factor=1.0, divide_by=ROWS)
        ((theirs(X)[:, 0] - Y).square().sum() / ROWS).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), expected in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)
        assert ours.grad is None
    assert all(p._version > before for p, before in zip(model.parameters(), versions, strict=True))


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)

    def broken(rows: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        return model.weight.sum() * float("nan"), len(rows), len(rows)

    with pytest.raises(DataError, match="at step 1"):
        fit(model, [5] * ROWS, broken, lambda: Validation(0.0, 0.0), SETTINGS, tmp_path, Reporter("test"))


def test_the_learning_rate_rises_then_falls_in_a_straight_line_to_zero() -> None:
    plan = Plan.of(1000, LoopSettings(epochs=1, batch_rows=10, warmup=0.1))
    factors = [plan.lr_factor(step) for step in range(1, plan.total + 1)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    falls = [a - b for a, b in zip(factors[9:], [*factors[10:], 0.0], strict=True)]
    assert falls == pytest.approx([falls[0]] * len(falls))
    assert plan.total in plan.evaluations


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", [1.0, 0.5, 0.0]), ("constant", [1.0, 1.0, 1.0])])
def test_the_other_schedules(schedule: str, expected: list[float]) -> None:
    settings = LoopSettings(epochs=1, batch_rows=1, warmup=0.01, schedule=schedule)  # type: ignore[arg-type]
    plan = Plan.of(101, settings)
    factors = [plan.lr_factor(step) for step in (2, 52, 101)]
    assert factors == pytest.approx(expected, abs=0.03)


def test_rows_computed_a_few_at_a_time_give_the_step_of_all_at_once(tmp_path: Path) -> None:
    def weights(micro_rows: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 1)
        settings = SETTINGS.model_copy(update={"micro_rows": micro_rows, "batch_rows": 7})
        return run(model, tmp_path / str(micro_rows), settings=settings)[0]

    whole = weights(None)
    for micro_rows in (1, 3):
        torch.testing.assert_close(weights(micro_rows), whole)


def test_the_best_checkpoint_may_be_the_one_with_the_most_right_lines(tmp_path: Path) -> None:
    model = linear()
    seen = iter(
        [Validation(1.0, 0.2), Validation(0.5, 0.6), Validation(0.7, 0.9), Validation(0.6, 0.9), Validation(0.4, 0.8)]
    )
    settings = SETTINGS.model_copy(update={"choose_by": "exact_match"})
    _, history = fit(model, [5] * ROWS, loss_of(model), lambda: next(seen), settings, tmp_path, Reporter("test"))
    assert history.best == {"step": 16, "loss": 0.6, "exact_match": 0.9}  # as many right as at 12, a lower loss


@pytest.mark.parametrize(
    ("training", "validating", "expected"),
    [
        ([2.0, 1.0, 0.5, 0.1], [2.0, 1.5, 1.6, 1.9], "overfitting: validation loss 1.5000 at step 2, 1.9000 at step 4"),
        ([2.0, 1.0, 0.5, 0.1], [2.0, 1.5, 1.5, 1.52], None),  # no worse than noise
        ([2.0, 1.0, 1.5, 2.1], [2.0, 1.5, 1.6, 1.9], None),  # both rise: something else
    ],
)
def test_overfitting_is_said(training: list[float], validating: list[float], expected: str | None) -> None:
    history = History(
        steps=[{"step": i, "loss": loss, "lr": 0.1} for i, loss in enumerate(training, 1)],
        evals=[{"step": i, "loss": loss, "exact_match": 0.0} for i, loss in enumerate(validating, 1)],
    )
    found = overfitting(history)
    assert found is None if expected is None else found is not None and found.startswith(expected)
