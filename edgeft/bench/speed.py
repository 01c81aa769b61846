"""How fast a session is: time to first token, prefill and decode rate, over repeats with their raw samples kept.

Not timed: rendering the template, tokenising, turning token ids into text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeft.bench.session import Session

WARM_UP_STEPS = 4
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


def measure(
    session: Session,
    prompt_ids: Sequence[int],
    decode_tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    on_repeat: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Raw samples (one per repeat, in seconds) and their summary.

    Every repeat starts from an empty context and decodes greedily, past stop tokens, so that all
    repeats do the same work. A warm-up repeat comes first and is not counted.
    """
    _repeat(session, prompt_ids, min(decode_tokens, WARM_UP_STEPS), clock)
    on_repeat()
    samples = []
    for _ in range(repeats):
        samples.append(_repeat(session, prompt_ids, decode_tokens, clock))
        on_repeat()
    return samples, summarise(samples)


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """ttft_s, prefill_tps, decode_tps: medians over repeats; decode_ms_p50, decode_ms_p95: over all single steps."""
    steps_ms = 1000 * np.concatenate([np.asarray(sample["decode_s"], np.float64) for sample in samples])
    return {
        "ttft_s": _median([sample["prefill_s"] + sample["choose_s"] for sample in samples]),
        "prefill_tps": _median([sample["prompt_tokens"] / sample["prefill_s"] for sample in samples]),
        "decode_tps": _median([len(sample["decode_s"]) / sum(sample["decode_s"]) for sample in samples]),
        "decode_ms_p50": float(np.percentile(steps_ms, 50)),
        "decode_ms_p95": float(np.percentile(steps_ms, 95)),
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
