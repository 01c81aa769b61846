"""Measuring a package on one target: the same row as on this machine, from jobs that ran there."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench import accuracy, conditions, speed
from edgeft.bench.devices.cooling import cooled, heat_marks, state_marks
from edgeft.bench.devices.device import Device, DeviceError, DeviceLost, opened
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.private import private_folder
from edgeft.bench.devices.work import PART_ROWS, Work
from edgeft.bench.follow import Follower
from edgeft.bench.footprint import read_footprint
from edgeft.bench.host import physical_cores
from edgeft.bench.run import as_result
from edgeft.bench.session import open_session
from edgeft.bench.table import SPEED_FIELDS
from edgeft.bench.told import Told
from edgeft.progress import Reporter

CPUS = re.compile(r"\d+(-\d+)?")
# As /proc/cpuinfo numbers them: Cortex-A53, A35, A55, A510, A520; Qualcomm's silver cores of Kryo 2xx, 3xx and 4xx.
LITTLE_PARTS = frozenset({"0xd03", "0xd04", "0xd05", "0xd46", "0xd80", "0x801", "0x803", "0x805"})
LITTLE_CLOCK = 0.8  # of the fastest core's clock
RETRIES, RETRY_S = 2, 5.0  # after a lost connection
EMULATED = "emulated: its timings say nothing about a device"
ABSENT = {
    "cold_load_s": "the page cache of a target is not emptied",
    "cold_ttft_s": "the page cache of a target is not emptied",
    "bandwidth_share": "the target's memory bandwidth is not measured",
    "gemm_share": "the target's arithmetic rate is not measured",
}
Context = AbstractContextManager[object]


@dataclass(frozen=True)
class Choice:
    """How targets are used: the folder for parts that were answered, cores to stay on ('4-7', 'big' or None), and
    whether doubtful timings are refused."""

    runs: Path
    cpus: str | None = None
    strict: bool = False


def bench_on(
    target: str,
    work: Work,
    choice: Choice,
    report: Reporter,
    quiet: Context | None = None,
    on_open: Callable[[Device], Context] = lambda device: nullcontext(),
    on_sent: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What `bench_package` returns, measured on `target`. `quiet` is held while this machine works for it; `on_open`
    gives what is held as long as the device is open; `on_sent` hears that the package is there.

    A lost connection is made again, in two attempts; rows that were answered are kept in `choice.runs` until all are.
    What could not be cleaned up in the end is told. Raises DeviceError if it cannot be measured.
    """
    lost = False
    for left in range(RETRIES, -1, -1):
        reached, found = False, dict[str, Any]()
        try:
            with opened(target) as device, on_open(device), _scratch() as near:
                reached = True
                found = _Bench(device, work, choice, report, quiet or nullcontext(), near, on_sent).measure()
            return found
        except DeviceError as error:
            if found:  # it failed at cleaning up, which costs nothing that was measured
                report.note(f"{error.message}; {error.hint}")
                return found
            lost = isinstance(error, DeviceLost) or (lost and not reached)  # it may not be back yet
            if not lost or not left:
                raise
            report.note(f"{error.message}; connecting again")
            time.sleep(RETRY_S)
    raise AssertionError


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on this side, for jobs and what comes back."""
    folder = Path(private_folder())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Bench:
    """One target, connected."""

    device: Device
    work: Work
    choice: Choice
    report: Reporter
    quiet: Context
    near: Path
    on_sent: Callable[[], None]

    def measure(self) -> dict[str, Any]:
        work, device = self.work, self.device
        if work.format not in device.formats:
            raise DeviceError(
                f"{device.name} runs {' and '.join(sorted(device.formats))} packages; {work.package} is {work.format}",
                "name a package of that format",
            )
        with self.quiet:
            device.push(work.files)
        self.on_sent()
        facts = device.probe() if device.emulated else cooled(device.probe, self.report)
        cpus = chosen_cpus(self.choice.cpus, facts)
        threads = work.settings.threads or (len(cpus) if cpus else default_threads(facts))
        result: dict[str, Any] = {"figures": {}, "samples": [], "rows": [], "details": {}, "choices": None}
        result["absent"] = dict(ABSENT)
        result["host"] = {**facts, "threads": threads, "cpus": cpus}
        result["conditions"] = {"target": device.name, "emulated": device.emulated, "threads": threads, "cpus": cpus}
        result["conditions"]["few_shot"] = 0
        if device.emulated:
            self._count(result, work.speed_job(threads, cpus))
        else:
            self._time(result, work.speed_job(threads, cpus), facts)
        result["figures"] |= read_footprint(work.package).figures()
        if work.cases:
            self._score(result, work.part_jobs(threads, cpus))
        return as_result(work.package, work.facts, result, work.rows)

    def _count(self, result: dict[str, Any], job: Job) -> None:
        """What an emulated device tells in place of times."""
        out = self._run(job)
        result["figures"]["runtime"] = out["runtime"]
        result["absent"] |= dict.fromkeys(SPEED_FIELDS, EMULATED)
        result["conditions"] |= {"marks": [], "instructions": out.get("instructions")}
        result["host"]["build"] = out["build"]

    def _time(self, result: dict[str, Any], job: Job, before: dict[str, Any]) -> None:
        out = self._run(job)
        after = self.device.probe()
        samples = out["samples"]
        assert job.speed is not None
        result["samples"] = samples
        result["figures"] = {
            "runtime": out["runtime"], "load_s": out["load_s"], **speed.summarise(samples),
            "warm_ups": out["warm_ups"], "repeats": len(samples), "spread": speed.spread(samples),
            "peak_rss_bytes": out["peak_rss_bytes"],
        }  # fmt: skip
        if out["peak_rss_bytes"] is None:
            result["absent"]["peak_rss_bytes"] = out["peak_rss"]
        threads = out.get("threads", job.threads)  # a target may be told another number in its name
        found = conditions.describe(moment_of(out["before"]), moment_of(out["after"]), samples, threads)
        found["marks"] += heat_marks(before, after) + state_marks(after, out.get("trace") or ())
        result["conditions"] |= {"prompt_tokens": len(job.speed.prompt), "decode_tokens": job.speed.decode_tokens}
        result["conditions"] |= {
            **found,
            **{key: [before[key], after[key]] for key in ("thermal", "battery", "screen")},
        }
        energy = out.get("energy") or {"joules_per_token": None, "absent": "the target's energy is not read"}
        result["figures"]["joules_per_token"] = energy["joules_per_token"]
        if energy["joules_per_token"] is None:
            result["absent"]["joules_per_token"] = energy["absent"]
        result["conditions"] |= {"energy": out.get("energy"), "wasm_memory": out.get("memory")}
        result["conditions"]["threads"] = result["host"]["threads"] = threads
        result["host"] |= {"after": after, "trace": out.get("trace")}
        result["host"] |= {"build": out["build"], "peak_rss": out["peak_rss"],
                           "context_tokens": job.context}  # fmt: skip
        result["conditions"]["better_runner"] = out.get("better_runner")
        if out.get("better_runner"):
            self.report.note(f"a faster runner fits this processor: {out['better_runner']}")
        for mark in found["marks"]:
            self.report.note(f"doubtful timings: {mark}")

    def _score(self, result: dict[str, Any], jobs: Sequence[Job]) -> None:
        folder = (
            self.choice.runs / f"target-{self.work.key(self.device.name, result['host'].get('build'), jobs)}.partial"
        )
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        parts = [self._part(folder / f"part-{number:04}.json", number, job) for number, job in enumerate(jobs)]
        result["host"]["accuracy_s"] = time.perf_counter() - start
        ids = [answer for part in parts for answer in part["answers"]]
        told = [told_of(one) for part in parts for one in part["references"]]
        with self.quiet:
            session = open_session(self.work.package, physical_cores())
            found = accuracy.assess(session, self.work.cases, self.work.task, ids, told)
            session.close()
        result["figures"] |= found.figures
        result["absent"] |= found.absent
        result["rows"], result["details"] = found.rows, found.details
        shutil.rmtree(folder)

    def _part(self, path: Path, number: int, job: Job) -> dict[str, Any]:
        """One part's answers: those that are kept, or new ones, then kept."""
        if path.is_file():
            self.report.note(
                f"rows {number * PART_ROWS + 1} to {number * PART_ROWS + len(job.rows)} are answered already"
            )
        else:
            out = self._run(job, number * PART_ROWS, len(self.work.cases))
            kept = {key: out[key] for key in ("answers", "references")}
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(kept), "utf-8")
            os.replace(partial, path)
        part: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return part

    def _run(self, job: Job, begun: int = 0, total: int | None = None) -> dict[str, Any]:
        with Follower(self.report, begun, total) as follower:
            return self.device.run(job, self.near, follower.line)


def moment_of(raw: dict[str, Any]) -> conditions.Moment:
    """What a runner wrote of the machine's state; what it cannot read is None."""
    known: dict[str, Any] = {field.name: raw.get(field.name) for field in fields(conditions.Moment)}
    return conditions.Moment(**known)


def told_of(raw: dict[str, Any]) -> Told:
    """What a runner wrote of one row's reference."""
    return Told(
        np.array(raw["next_logprob"], np.float64),
        np.array(raw["argmax"], np.int64),
        np.array(raw["top_logprob"], np.float64),
    )


def big_cores(facts: dict[str, Any]) -> list[int]:
    """All cores but the little ones; all where there is one kind."""
    return sorted(cpu for cluster in _big_clusters(facts) for cpu in cluster["cpus"])


def default_threads(facts: dict[str, Any]) -> int:
    """One for each big core; where no kinds are known, one for each physical core."""
    known: int = sum(cluster["physical"] for cluster in _big_clusters(facts))
    return known or facts["cores_physical"] or facts["cores_logical"] or 1


def _big_clusters(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Kinds of cores that are no little ones, by their part or, where none is told, by a clock far below the fastest's;
    every core waits for the slowest after each matrix. Favoured cores of one kind differ in their clocks, too."""
    clusters = facts["clusters"] or []
    fastest = max((cluster["max_mhz"] or 0.0 for cluster in clusters), default=0.0)

    def little(cluster: dict[str, Any]) -> bool:
        part = cluster["part"]
        return part in LITTLE_PARTS if part else (cluster["max_mhz"] or 0.0) < LITTLE_CLOCK * fastest

    return [cluster for cluster in clusters if not little(cluster)] or clusters


def chosen_cpus(text: str | None, facts: dict[str, Any]) -> list[int] | None:
    """'big', or numbers like '4-7' or '0,2,4-5'. Raises DeviceError for others, and for cores that are not there."""
    if text is None:
        return None
    if text == "big":
        if not facts["clusters"]:
            raise DeviceError("--cpus big: the target does not tell its kinds of cores", "name some, like 4-7")
        return big_cores(facts)
    chosen: set[int] = set()
    for part in text.split(","):
        if not CPUS.fullmatch(part):
            raise DeviceError(f"--cpus {text!r} names no cores", "write 'big', or numbers like 4-7 or 0,2")
        first, _, last = part.partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    there = {cpu for cluster in facts["clusters"] or [] for cpu in cluster["cpus"]}
    if there and not chosen <= there:
        raise DeviceError(f"--cpus {text}: the target has the cores {min(there)} to {max(there)}", "name some of these")
    return sorted(chosen)
