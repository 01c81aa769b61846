"""One rung of the ladder: a package beside the torch model it was made from, measured on the frozen probe set.

Whole rows, then token by token through the cache, alone and several rows together, then greedy answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.bench.session import Logits, Session
from edgeft.errors import ParityError
from edgeft.formats.parity import Differences, Parity, compare_answers, differences, summarize, worst_row
from edgeft.formats.probe import Probe
from edgeft.progress import Reporter

SINGLE_ROWS, TOGETHER_ROWS = 2, 8  # rows decoded token by token as well: one at a time, and together
STEP_KL = 0.02  # nats; most that rounding made of a step in the cases measured was a quarter of it

Row = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Limits:
    """What a package may differ by, in nats."""

    kl_mean: float  # from the torch model, on the task's rows and on general text
    kl_p99: float

    @property
    def steps(self) -> float:
        """Mean between whole rows and single steps: kernels for one token and for many round differently."""
        return min(2 * self.kl_mean, STEP_KL)


def context_for(probe: Probe) -> int:
    """Tokens that the longest row, and the longest greedy answer, need."""
    answers = [len(probe.prompt(row)) + probe.greedy_limit for row in range(len(probe.greedy))]
    return max([*map(len, probe.rows), *answers])


def measure(
    session: Session, probe: Probe, limits: Limits, package: str, explain: Callable[[], str], report: Reporter
) -> dict[str, Any]:
    """All figures of a rung. Raises ParityError if the package is beyond a limit; `explain` says where it parts."""
    parts = _score(session, probe, report)
    task, general = parts[: probe.task_rows], parts[probe.task_rows :]
    _check(f"the {package} package on validation rows", task, probe, 0, limits, explain)
    if general:
        _check(f"the {package} package on general text", general, probe, probe.task_rows, limits, explain)
    rows = _evenly(range(probe.task_rows), TOGETHER_ROWS)
    alone = _check_steps("token by token", _single_steps, session, probe, rows[:SINGLE_ROWS], limits, package)
    together = _check_steps("with several rows at once", _steps, session, probe, rows, limits, package)
    prompts = [probe.prompt(row) for row in range(len(probe.greedy))]
    answers = session.generate(prompts, probe.greedy_limit) if prompts else []
    return {
        **asdict(summarize(task)),
        "general": asdict(summarize(general)) if general else None,
        "worst_row": probe.where(worst_row(parts)),
        "step_kl_mean": alone.kl_mean,
        "steps": {"rows": len(rows[:SINGLE_ROWS]), **_short(alone)},
        "steps_together": {"rows": len(rows), **_short(together)},
        "greedy": asdict(compare_answers(probe.greedy, answers)),
        "threshold": limits.kl_mean,
        "threshold_p99": limits.kl_p99,
        "threshold_steps": limits.steps,
    }


def _short(parity: Parity) -> dict[str, float]:
    return {name: getattr(parity, name) for name in ("kl_mean", "kl_p99", "kl_max", "top1", "n_positions")}


def _score(session: Session, probe: Probe, report: Reporter) -> list[Differences]:
    """One entry per row of the probe, from whole rows."""
    parts: list[Differences] = []
    with report.track("comparing", len(probe.rows)) as task:
        for row, logits_PV in enumerate(session.score(list(zip(probe.rows, probe.positions, strict=True)))):
            reference_PV, next_ids_P = _of_row(probe, row)
            parts.append(differences(reference_PV, logits_PV, next_ids_P))
            report.metric(row=probe.where(row), kl_mean=float(parts[-1].kl_P.mean()))
            task.advance()
    return parts


def _check(
    what: str, parts: list[Differences], probe: Probe, first: int, limits: Limits, explain: Callable[[], str]
) -> None:
    parity = summarize(parts)
    if parity.kl_mean <= limits.kl_mean and parity.kl_p99 <= limits.kl_p99:
        return
    worst = worst_row(parts)
    raise ParityError(
        f"{what} does not agree with the torch model: mean KL {parity.kl_mean:.4g} nats over "
        f"{parity.n_positions} positions, at most {limits.kl_mean:g} expected; 99th percentile {parity.kl_p99:.4g}, at "
        f"most {limits.kl_p99:g}; top-1 agreement {parity.top1:.1%}; worst row {probe.where(first + worst)} with "
        f"{parts[worst].kl_P.mean():.4g}\n  {explain()}",
        "use a wider type, or raise export.max_kl in the recipe if the accuracy on your task is still good enough",
    )


def _check_steps(
    how: str,
    steps: Callable[[Session, list[Row]], Iterable[Logits]],
    session: Session,
    probe: Probe,
    rows: list[int],
    limits: Limits,
    package: str,
) -> Parity:
    given: list[Row] = [(probe.rows[row], probe.positions[row]) for row in rows]
    whole = list(session.score(given))  # all of it first: both may use the same cache
    stepped = steps(session, given)
    parts = [differences(a, b, _of_row(probe, row)[1]) for row, a, b in zip(rows, whole, stepped, strict=True)]
    parity, worst = summarize(parts), rows[worst_row(parts)]
    if parity.kl_mean > limits.steps:
        raise ParityError(
            f"the {package} package predicts otherwise {how}, through its cache, than in whole rows: mean KL "
            f"{parity.kl_mean:.4g} nats, at most {limits.steps:g} expected; worst row {probe.where(worst)}",
            "the graph or the runtime handles keys and values wrongly: export in the other format",
        )
    return parity


def _single_steps(session: Session, rows: list[Row]) -> Iterable[Logits]:
    for ids, at in rows:
        steps = [session.prefill(ids[: at[0] + 1]).copy()]
        steps += [session.step(token).copy() for token in ids[at[0] + 1 : at[-1] + 1]]
        yield np.stack(steps)[np.array(at) - at[0]]


def _steps(session: Session, rows: list[Row]) -> Iterable[Logits]:
    return session.replay(rows)


def _of_row(probe: Probe, row: int) -> tuple[Logits, NDArray[np.int32]]:
    """The reference logits of a row, and the tokens that really follow."""
    ids, at = probe.rows[row], probe.positions[row]
    start = sum(map(len, probe.positions[:row]))
    return np.asarray(probe.logits_PV[start : start + len(at)]), np.array([ids[i + 1] for i in at], np.int32)


def _evenly(rows: range, number: int) -> list[int]:
    return [rows[i * len(rows) // number] for i in range(number)] if len(rows) > number else list(rows)
