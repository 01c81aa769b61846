"""Runners that were built before, and what they are asked in tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.job import LOGITS, Job
from edgeft.bench.devices.native import Level, runner_of


def built_runner(target: str, level: Level) -> Path:
    """The runner in the user's cache; skips the test where it has not been built."""
    try:
        return runner_of(target, level)
    except DeviceError as error:
        pytest.skip(f"{error.message}; {error.hint}")


def run(runner: Path, model: Path, job: Job | str, folder: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a job; logits.bin comes to `folder`."""
    (folder / "job.json").write_text(job if isinstance(job, str) else job.text())
    (folder / LOGITS).unlink(missing_ok=True)
    argv = [str(runner), str(model), "job.json", "out.json"]
    ran = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=250)
    out = folder / "out.json"
    found = json.loads(out.read_text()) if out.is_file() else {"stderr": ran.stderr}
    assert not list(folder.glob("*.partial"))
    return ran.returncode, found
