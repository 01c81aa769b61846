from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from edgeft.bench import host


def test_an_affinity_mask_hides_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert host.physical_cores() == 3


def test_hyper_threads_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.physical_cores() == 4


def test_every_null_fact_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_governor", lambda: None)
    monkeypatch.setattr(host, "_version", lambda name: None)
    facts = json.loads(json.dumps(host.host_facts()))
    nulls = {name for name, value in facts.items() if value is None}
    nulls |= {f"versions.{name}" for name, value in facts["versions"].items() if value is None}
    assert {"governor", "versions.numpy"} <= nulls
    assert nulls == set(facts["absent"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hand the peak down")
def test_the_peak_of_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(100_000_000)  # 800 MB that the child has nothing to do with
    program = "from edgeft.bench.host import peak_rss; print(peak_rss()[0])"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 5e6 < int(said) < 0.5 * held.nbytes
