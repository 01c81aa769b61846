"""The memory expected against what a process of its own then takes, and limits that are kept or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "memory_program.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


def train(limit: float | None, checkpoints: Path) -> dict[str, Any]:
    command = [sys.executable, PROGRAM, json.dumps(limit), checkpoints]
    env = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Without a limit."""
    return train(None, tmp_path_factory.mktemp("free"))


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is said of a limit that nothing keeps."""
    error: str = train(0.1, tmp_path_factory.mktemp("refused"))["error"]
    return error


def least_gb(refused: str) -> float:
    return float(refused.split("take about ")[1].split(" GB")[0])


def test_the_peak_is_what_was_expected(free: dict[str, Any]) -> None:
    assert free["rows"] == 4
    assert free["expected"] == pytest.approx(free["peak"], rel=0.2)


def test_a_limit_is_kept_with_fewer_rows_and_the_choice_outlives_it(free: dict[str, Any], tmp_path: Path) -> None:
    limit = free["expected"] * 0.8
    limited = train(limit / 1e9, tmp_path)
    assert 1 <= limited["rows"] < 4
    assert not limited["twice"]
    assert limited["peak"] < limit * 1.1
    assert limited["expected"] == pytest.approx(limited["peak"], rel=0.2)
    assert train(100.0, tmp_path)["rows"] == limited["rows"]  # a resumed run goes on as it began


def test_a_limit_that_nothing_keeps_says_what_would(refused: str) -> None:
    assert "0.1 GB is too little" in refused
    assert least_gb(refused) > 0.1


def test_layers_are_computed_twice_where_fewer_rows_are_not_enough(
    free: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    limited = train(least_gb(refused) + 0.07, tmp_path)
    assert limited["twice"]
    assert limited["rows"] >= 1
    assert limited["peak"] < free["peak"]
