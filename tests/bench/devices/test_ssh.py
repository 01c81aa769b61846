"""Against a real sshd on this machine: Debian's openssh-server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.targets.sshd import Sshd
from edgeft.bench.devices import measure, native, work
from edgeft.bench.devices.device import HERE, DeviceError, opened
from edgeft.bench.devices.facts import FIELDS
from edgeft.bench.devices.fleet import bench_fleet
from edgeft.bench.devices.measure import Choice
from edgeft.bench.devices.shell import hint, reason
from edgeft.bench.devices.ssh import SshDevice
from edgeft.settings import BenchSettings, TaskSettings

QUICK = BenchSettings(threads=1, prompt_tokens=24, decode_tokens=4, repeats=3, max_new_tokens=4, seconds=0)


def heard(line: str) -> None:
    """Nobody listens."""


def test_a_command_runs_in_the_private_folder_and_its_code_and_signal_come_back(sshd: Sshd) -> None:
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        assert device.place == HERE
        lines: list[str] = []
        assert device.call(["pwd"], lines.append).code == 0
        assert lines == [device.folder] and Path(device.folder).parent == sshd.home
        assert Path(device.folder).stat().st_mode & 0o077 == 0
        assert device.call(["sh", "-c", "echo 'a b'; exit 7"], lines.append).code == 7
        assert lines[-1] == "a b"
        killed = device.call(["sh", "-c", "kill -KILL $$"], heard)
        assert killed.code == 137 and "SIGKILL" in reason(killed) and "memory" in hint(killed)
        assert "not there" in hint(device.call(["no-such-program"], heard))
    assert sshd.left_behind() == []


def test_what_a_dead_guard_or_an_earlier_boot_left_goes_at_the_next_connection_and_nothing_else(sshd: Sshd) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = os.readlink("/proc/self/ns/pid")
    folders = {}
    for name, lines in {
        "rebooted": ["another boot", space, str(os.getpid())],
        "killed": [boot, space, str(gone.pid)],
        "guarded": [boot, space, str(os.getpid())],
        "elsewhere": [boot, "pid:[1]", str(gone.pid)],
        "unmarked": [],
    }.items():
        folders[name] = sshd.home / f".edgeft-{name}"
        folders[name].mkdir()
        (folders[name] / "model.gguf").touch()
        if lines:
            (folders[name] / ".guard").write_text("\n".join(lines) + "\n")
    try:
        with opened(sshd.target()) as device:
            assert isinstance(device, SshDevice)
            assert {name for name, folder in folders.items() if folder.exists()} == {"guarded", "elsewhere", "unmarked"}
            with opened(sshd.target()) as second:
                assert isinstance(second, SshDevice) and Path(device.folder).exists(), "its guard is alive"
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def test_a_native_runner_that_does_not_start_there_gives_way_to_the_next(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = []
    for name, text in (("native", "exit 127"), ("static", "echo '{\"runner\": 1}'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o700)
        runners.append(tmp_path / name)
    monkeypatch.setattr(native, "find_runners", lambda machine, features: runners)
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        assert device._native() == ["./edgeft-runner", "model.gguf"]
        assert Path(device.folder, "edgeft-runner").read_bytes() == runners[1].read_bytes()
        runners.pop()
        with pytest.raises(DeviceError, match="does not start"):
            device._native()


def test_files_arrive_whole_once_and_come_back(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3_000_000))
    (tmp_path / "name with 'quotes'").write_text("x")
    files = {"deep/big": tmp_path / "big", "name with 'quotes'": tmp_path / "name with 'quotes'"}
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        device.push(files)
        there = Path(device.folder, "deep/big")
        assert there.read_bytes() == (tmp_path / "big").read_bytes()
        first = there.stat().st_ino
        device.push(files)
        assert there.stat().st_ino == first  # not sent again
        there.write_bytes(b"broken")
        device.push(files)
        assert there.stat().st_size == 3_000_000
        back = tmp_path / "back"
        back.mkdir()
        device.pull(["name with 'quotes'", "missing"], back)
        assert [path.name for path in back.iterdir()] == ["name with 'quotes'"]


def test_the_facts_are_those_of_the_machine(sshd: Sshd) -> None:
    with opened(sshd.target()) as device:
        facts = device.probe()
    assert set(FIELDS) <= set(facts)
    assert facts["cores_logical"] == os.cpu_count()
    assert facts["ram_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert all(facts["absent"][field] for field in FIELDS if facts[field] is None)


def test_rows_answered_before_the_connection_broke_are_not_asked_again(
    sshd: Sshd, tiny_onnx_package: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PART_ROWS", 3)
    monkeypatch.setattr(measure, "PART_ROWS", 3)
    monkeypatch.setattr(measure, "RETRY_S", 0.0)
    asked: list[int] = []
    real = SshDevice.run

    def run(self: SshDevice, job: Any, scratch: Path, on_line: Any) -> dict[str, Any]:
        asked.append(len(job.rows))
        if asked == [0, 3, 2]:  # the connection breaks while the second part runs
            assert sshd.drop_connections() == 1
        return real(self, job, scratch, on_line)

    monkeypatch.setattr(SshDevice, "run", run)
    given = work.prepare(tiny_onnx_package, rows, QUICK, TaskSettings())
    [there] = bench_fleet([sshd.target()], given, Choice(tmp_path), None)
    assert there["error"] is None
    assert asked == [0, 3, 2, 0, 2]
    [here] = bench_fleet(["local"], given, Choice(tmp_path), None)
    for figure in ("n", "joint_exact_match", "perplexity", "answer_tokens", "runtime", "digest"):
        assert there[figure] == here[figure], figure
    assert there["decode_tps"] > 1 and there["conditions"]["target"] == sshd.target()
    assert list(tmp_path.iterdir()) == []
