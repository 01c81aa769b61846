"""One job of a runner: what it is to time, answer and score, all token ids, and the shape of what it writes.

`edgeft-runner MODEL JOB.json OUT.json` (native), `python -m edgeft.bench.devices.worker` (Python) and the browser's
page take the same job. A runner tokenises nothing: the host does, with the package's own tokenizer. P is a number of
positions, V the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

RUNNER = 1  # of job and result; raised when either changes its meaning
JOB, OUT, LOGITS = "job.json", "out.json", "logits.bin"


@dataclass(frozen=True)
class SpeedJob:
    """Warm up until one repeat is not 3% faster than the one before (6 at most), then time `repeats` repeats.

    Each starts with an empty context, prefills `prompt`, takes the likeliest token and decodes `decode_tokens` steps
    greedily, past stop tokens.
    """

    prompt: Sequence[int]
    decode_tokens: int
    repeats: int


@dataclass(frozen=True)
class RowJob:
    """Answer `prompt` greedily, and say how likely each token of `reference` is after it (teacher-forced)."""

    prompt: Sequence[int]
    reference: Sequence[int] = ()


@dataclass(frozen=True)
class ForcedJob:
    """A teacher-forced row: the logits after each of `positions` (ascending) of `ids` are wanted."""

    ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class Job:
    """What one process of a runner does. `context`: tokens of the longest row with its answer.

    `cpus`: cores to stay on, or None. `logits`: a file beside the result, float32 little-endian [P, V] of the forced
    rows' positions in order. Answers end before a stop token, and after `max_new_tokens` at the latest.
    """

    threads: int
    context: int
    stop_ids: Sequence[int] = ()
    max_new_tokens: int = 0
    cpus: Sequence[int] | None = None
    speed: SpeedJob | None = None
    rows: Sequence[RowJob] = ()
    forced: Sequence[ForcedJob] = ()
    logits: str | None = None

    def text(self) -> str:
        """The job file."""
        return json.dumps({"runner": RUNNER, **asdict(self)}, separators=(",", ":"))


def job_of(text: str) -> Job:
    """The job in a job file's text. Raises ValueError if it is of another version than this code."""
    raw = json.loads(text)
    if raw.pop("runner", None) != RUNNER:
        raise ValueError(f"the job is not of version {RUNNER}")
    speed = raw.pop("speed")
    rows = [RowJob(**row) for row in raw.pop("rows")]
    forced = [ForcedJob(**row) for row in raw.pop("forced")]
    return Job(**raw, speed=SpeedJob(**speed) if speed else None, rows=rows, forced=forced)
