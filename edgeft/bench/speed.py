"""How fast a session is: time to first token, prefill and decode rate, over repeats with their raw samples kept.

Not timed: rendering the template, tokenising, turning token ids into text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeft.bench.session import Session
from edgeft.bench.stats import bootstrap_median

WARM_UP_STEPS = 4
MAX_WARM_UPS = 6
STEADY = 0.03
PERCENTILES = (50, 90, 95, 99)
MIN_CONTEXT = 512


def prompt_of_length(ids: Sequence[int], length: int) -> list[int]:
    """Exactly `length` token ids: `ids`, repeated as often as needed and cut."""
    if not ids:
        raise ValueError("a prompt needs at least one real token")
    repeated = list(ids) * (length // len(ids) + 1)
    return repeated[:length]


def context_needed(prompt_tokens: int, decode_tokens: int) -> int:
    """Context in tokens that `measure` needs; the peak memory that is reported belongs to this context."""
    return max(MIN_CONTEXT, prompt_tokens + max(decode_tokens, WARM_UP_STEPS) + 1)


@dataclass(frozen=True)
class Effort:
    """How much is measured: at least `repeats`, then more until the medians are known to +-`precision` (95%), or the
    `seconds` have passed."""

    repeats: int
    seconds: float
    precision: float


def measure(
    session: Session,
    prompt_ids: Sequence[int],
    decode_tokens: int,
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    on_repeat: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Raw samples (one per repeat, in seconds) and their summary.

    Every repeat starts from an empty context and decodes greedily, past stop tokens, so that all
    repeats do the same work. Before the first that counts come as many as it takes until one is not
    much faster than the one before it.
    """
    start = clock()
    warm_ups = _warm_up(session, prompt_ids, decode_tokens, clock)
    on_repeat()
    samples: list[dict[str, Any]] = []
    while len(samples) < effort.repeats or (clock() - start < effort.seconds and spread(samples) > effort.precision):
        samples.append(_repeat(session, prompt_ids, decode_tokens, clock))
        on_repeat()
    return samples, {**summarise(samples), "warm_ups": warm_ups, "repeats": len(samples), "spread": spread(samples)}


def _warm_up(session: Session, prompt_ids: Sequence[int], decode_tokens: int, clock: Callable[[], float]) -> int:
    """Short answers until they get no faster by more than `STEADY`; returns their number."""
    last = float("inf")
    for number in range(1, MAX_WARM_UPS + 1):
        sample = _repeat(session, prompt_ids, min(decode_tokens, WARM_UP_STEPS), clock)
        taken = sample["prefill_s"] + sum(sample["decode_s"])
        if taken > (1 - STEADY) * last:
            return number
        last = taken
    return MAX_WARM_UPS


def spread(samples: Sequence[dict[str, Any]]) -> float:
    """Half the 95% interval of the median, relative to it, of the prefill or the decode rate, whichever is wider."""
    spreads = []
    for rates in (_prefill_rates(samples), _decode_rates(samples)):
        value, low, high = bootstrap_median(rates)
        spreads.append((high - low) / 2 / value)
    return max(spreads)


def _prefill_rates(samples: Sequence[dict[str, Any]]) -> list[float]:
    return [sample["prompt_tokens"] / sample["prefill_s"] for sample in samples]


def _decode_rates(samples: Sequence[dict[str, Any]]) -> list[float]:
    return [len(sample["decode_s"]) / sum(sample["decode_s"]) for sample in samples]


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """ttft_s, prefill_tps, decode_tps: medians over repeats; decode_ms_p50 to p99: over all single steps, of which
    the first token is none."""
    steps_ms = 1000 * np.concatenate([np.asarray(sample["decode_s"], np.float64) for sample in samples])
    return {
        "ttft_s": _median([sample["prefill_s"] + sample["choose_s"] for sample in samples]),
        "prefill_tps": _median(_prefill_rates(samples)),
        "decode_tps": _median(_decode_rates(samples)),
        **{f"decode_ms_p{p}": float(np.percentile(steps_ms, p)) for p in PERCENTILES},
    }


def _repeat(
    session: Session, prompt_ids: Sequence[int], decode_tokens: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One answer. The first token is the prefill's and counts for TTFT alone, never for the decode rate."""
    session.reset()
    start = clock()
    logits_V = session.prefill(prompt_ids)
    prefilled = clock()
    token = int(np.argmax(logits_V))
    chosen = mark = clock()
    decode_s = []
    for _ in range(decode_tokens):
        token = int(np.argmax(session.step(token)))
        now = clock()
        decode_s.append(now - mark)
        mark = now
    return {
        "prompt_tokens": len(prompt_ids),
        "prefill_s": prefilled - start,
        "choose_s": chosen - prefilled,
        "decode_s": decode_s,
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
