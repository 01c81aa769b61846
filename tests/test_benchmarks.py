"""The scripts under benchmarks/ start; what they measure is looked at by people."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "script",
    [
        "training.compare",
        "training.step_profile",
        "distill.compare",
        "targets.fit",
        "targets.run",
        "export.int4",
        "export.run",
        "speed.accuracy_rows",
    ],
)
def test_a_benchmark_says_what_it_measures(script: str) -> None:
    command, env = [sys.executable, "-m", f"benchmarks.{script}", "--help"], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
