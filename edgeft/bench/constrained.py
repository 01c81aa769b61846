"""Bench a package with the memory and threads that a device would give it, and say what that shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft.bench.host import physical_cores
from edgeft.bench.like import TELLS, TELLS_NOT, confined, forget_cached
from edgeft.bench.profiles import Profile
from edgeft.bench.run import bench_package
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings


def bench_like(
    name: str,
    profile: Profile,
    package: Path,
    rows: Sequence[dict[str, Any]] | None,
    settings: BenchSettings,
    task: TaskSettings,
    report: Reporter,
    runtime: str | None = None,
) -> dict[str, Any]:
    """A table row as `bench_package` gives it, with `like`: the limits that held and what they do and do not tell.

    Raises EdgeftError if the package does not fit into the device's memory, or no limit can be set here.
    """
    threads = settings.threads or min(profile.threads, physical_cores())
    with confined(profile.usable_bytes) as limit:
        forget_cached(package)
        try:
            found = bench_package(
                package,
                rows,
                settings.model_copy(update={"threads": threads}),
                task,
                None,
                report,
                limit,
                runtime=runtime,
            )
        except EdgeftError as error:
            if limit.was_full():
                raise EdgeftError(
                    f"{package} does not fit {name}: it was stopped at {profile.usable_bytes / 1e6:,.0f} MB",
                    "take a smaller type or a smaller model; `edgeft devices PACKAGE` says what fits",
                ) from error
            raise
        peak = limit.peak_bytes()
    like = {
        "device": name,
        "memory_limit_bytes": profile.usable_bytes,
        "memory_peak_bytes": peak,
        "limited_by": limit.how,
        "threads": threads,
        "device_threads": profile.threads,
        "cpu": "only the number of threads is the device's; nothing slows this CPU down",
        "weights": _loading(package),
        "tells": TELLS,
        "tells_not": TELLS_NOT,
    }
    return {**found["row"], "like": like}


def said(like: dict[str, Any]) -> list[str]:
    """The same for people."""
    peak = like["memory_peak_bytes"]
    used = f", {peak / 1e6:,.0f} MB of it used" if peak is not None else ""
    return [
        f"like {like['device']}: at most {like['memory_limit_bytes'] / 1e6:,.0f} MB ({like['limited_by']}){used}; "
        f"{like['threads']} of the device's {like['device_threads']} threads; {like['cpu']}.",
        f"{like['weights'][0].upper()}{like['weights'][1:]}.",
        like["tells"],
        like["tells_not"],
    ]


def _loading(package: Path) -> str:
    if (package / "model.gguf").is_file():
        return "weights were read into memory, not mapped: mapped pages that are cached already count for nobody"
    return (
        "the files were dropped from the page cache first, so that mapped weights count; the kernel may drop them again"
    )
