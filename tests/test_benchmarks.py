"""The scripts under benchmarks/ start; what they measure is looked at by people."""

from __future__ import annotations

import runpy
import sys

import pytest


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
        "speed.run",
    ],
)
def test_a_benchmark_says_what_it_measures(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    assert left.value.code == 0
    assert "usage" in capsys.readouterr().out
