"""A job of `job.py` done by edgeft's page (web/main.js): the timed loops run there, everything around them here."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgeft.bench.devices.device import OnLine
from edgeft.bench.devices.job import LOGITS, Job, SpeedJob
from edgeft.bench.speed import MAX_WARM_UPS, STEADY, WARM_UP_STEPS

Call = Callable[..., Any]  # call("timed", prompt, steps): one function of the page, its result as JSON
MEMORY_S = 30  # the browser measures memory when it next collects garbage


class Texts(Protocol):
    """Tokens as the page takes them, and back."""

    def of(self, ids: Sequence[int]) -> dict[str, Any]:
        """{"ids", "pieces"}."""

    def ids(self, text: str) -> list[int]:
        """Of an answer of which only the text was told."""


class Ids:
    """`Texts` for a runtime that takes and gives ids."""

    def of(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"ids": list(ids), "pieces": []}

    def ids(self, text: str) -> list[int]:
        raise NotImplementedError("this runtime gives ids")


def do_job(
    call: Call, texts: Texts, job: Job, scratch: Path, on_line: OnLine, peak: Callable[[], tuple[int | None, str]]
) -> dict[str, Any]:
    """Everything in the job's result that the page itself gives; logits.bin goes to `scratch`.

    `peak` is asked right after the speed part.
    """
    found: dict[str, Any] = {"samples": [], "warm_ups": 0, "memory": None}
    if job.speed:
        prompt = texts.of(job.speed.prompt)
        found["warm_ups"] = _warm_up(call, prompt, job.speed)
        for number in range(job.speed.repeats):
            found["samples"].append(call("timed", prompt, job.speed.decode_tokens))
            _say(on_line, "speed", number + 1, job.speed.repeats)
        found["peak_rss_bytes"], found["peak_rss"] = peak()
        found["memory"] = call("memory", MEMORY_S)
    rows = []
    for number, row in enumerate(job.rows, 1):
        given = texts.of(row.prompt), texts.of([*row.prompt, *row.reference])
        reference = {key: values[len(row.prompt) :] for key, values in given[1].items()}
        rows.append(call("row", given[0], reference, list(job.stop_ids), job.max_new_tokens))
        _say(on_line, "answers", number, len(job.rows))
    found["answers"] = [row["answer"] if "answer" in row else texts.ids(row["text"]) for row in rows]
    found["references"] = [row["reference"] for row in rows]
    found["forced"] = _forced(call, texts, job, scratch, on_line)
    return found


def _forced(call: Call, texts: Texts, job: Job, scratch: Path, on_line: OnLine) -> list[dict[str, Any]]:
    """Scores of the teacher-forced rows; their logits, or log-probabilities, are appended to one file."""
    scores: list[dict[str, Any]] = []
    path = scratch / (job.logits or LOGITS)
    path.unlink(missing_ok=True)
    for number, row in enumerate(job.forced, 1):
        found = call("score", texts.of(row.ids), list(row.positions), bool(job.logits))
        if job.logits:
            with path.open("ab") as f:
                f.write(base64.b64decode(found.pop("logits")))
        scores.append(found)
        _say(on_line, "forced", number, len(job.forced))
    return scores


def _warm_up(call: Call, prompt: dict[str, Any], speed: SpeedJob) -> int:
    """Short answers until they get no faster, as speed.py's; returns their number."""
    last = float("inf")
    for number in range(1, MAX_WARM_UPS + 1):
        sample = call("timed", prompt, min(speed.decode_tokens, WARM_UP_STEPS))
        taken = sample["prefill_s"] + sum(_floats(sample["decode_s"]))
        if taken > (1 - STEADY) * last:
            return number
        last = taken
    return MAX_WARM_UPS


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _say(on_line: OnLine, what: str, done: int, total: int) -> None:
    on_line(json.dumps({"what": what, "total": total, "done": done}))
