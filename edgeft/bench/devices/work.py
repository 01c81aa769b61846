"""What is asked of every target: a package and its rows, tokenised once on this machine by the package's runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.artifact import LOG_DIR, MANIFEST, digest_of, file_sha256
from edgeft.bench import accuracy, speed
from edgeft.bench.devices.job import Job, RowJob, SpeedJob
from edgeft.bench.host import physical_cores
from edgeft.bench.run import Rows, package_facts
from edgeft.bench.session import Messages, open_session
from edgeft.bench.task import Task
from edgeft.bench.worker import FILLER
from edgeft.settings import BenchSettings, TaskSettings

PART_ROWS = 50  # of one job: what a broken connection costs at most


@dataclass(frozen=True)
class Work:
    """`facts` as `package_facts` gives them; `prompt` is what speed is measured with; `cases` the rows' tokens."""

    package: Path
    facts: dict[str, Any]
    files: dict[str, Path]
    digest: str
    prompt: Sequence[int]
    stop_ids: Sequence[int]
    cases: Sequence[accuracy.Case]
    rows: Rows | None
    task: Task
    settings: BenchSettings

    @property
    def format(self) -> str:
        return str(self.facts["values"]["format"])

    def speed_job(self, threads: int, cpus: Sequence[int] | None) -> Job:
        settings = self.settings
        job = SpeedJob(self.prompt, settings.decode_tokens, settings.repeats)
        context = speed.context_needed(len(self.prompt), settings.decode_tokens)
        return Job(threads, context, self.stop_ids, cpus=cpus, speed=job)

    def part_jobs(self, threads: int, cpus: Sequence[int] | None) -> list[Job]:
        """The rows in parts."""
        if not self.cases:
            return []
        limit = self.settings.max_new_tokens
        context = accuracy.context_needed(self.cases, limit)
        rows = [RowJob(case.prompt_ids, case.reference_ids) for case in self.cases]
        return [
            Job(threads, context, self.stop_ids, limit, cpus, rows=rows[start : start + PART_ROWS])
            for start in range(0, len(rows), PART_ROWS)
        ]

    def key(self, target: str, build: str | None, jobs: Sequence[Job]) -> str:
        """Of the answers to these jobs on a target, by this build of its runtime."""
        return digest_of([self.digest, target, build, [job.text() for job in jobs]])[:16]


def prepare(package: Path, rows: Rows | None, settings: BenchSettings, task: TaskSettings) -> Work:
    """Raises ArtifactError if `package` is none, DataError for a row that is no conversation with an answer."""
    facts = package_facts(package)
    judged = Task(task.label, task.fields, task.escalation)
    session = open_session(package, physical_cores())
    cases = accuracy.prepare(session, rows, judged) if rows else []
    asked: Messages = [{"role": "user", "content": FILLER}]
    ids = [token for case in cases[: settings.prompt_tokens] for token in case.prompt_ids]
    prompt = speed.prompt_of_length(ids or session.prompt_ids(asked), settings.prompt_tokens)
    stop_ids = sorted(session.stop_ids)
    session.close()
    files = files_of(package)
    digest = digest_of({name: file_sha256(path) for name, path in files.items()})
    return Work(package, facts, files, digest, prompt, stop_ids, cases, rows, judged, settings)


def files_of(package: Path) -> dict[str, Path]:
    """What a target needs of a package, by its names there: a GGUF's one file, an ONNX folder without its records."""
    if (package / "model.gguf").is_file():
        return {"model.gguf": package / "model.gguf"}
    found = {path.relative_to(package).as_posix(): path for path in sorted(package.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and not name.startswith(f"{LOG_DIR}/")}
