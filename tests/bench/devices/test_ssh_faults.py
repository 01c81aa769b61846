"""What can go wrong on the way to a device and on it, provoked against a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.targets.sshd import Sshd
from edgeft.bench.devices.device import DeviceError, DeviceLost, opened
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.shell import check_runner, run_job
from edgeft.bench.devices.ssh import SshDevice
from tests.bench.devices.conftest import ROOT

AARCH64_ELF = bytes.fromhex("7f454c460201010000000000000000000200b700") + bytes(108)  # a header, for another processor


def heard(line: str) -> None:
    """Nobody listens."""


def script(folder: Path, text: str) -> Path:
    path = folder / "edgeft-runner"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize(
    ("target", "found", "advice"),
    [
        ("ssh:nobody-home", "Connection refused", "sshd running"),
        ("ssh:stranger", "Host key verification failed", "accept the host's key"),
        ("ssh:edge:/no/such/folder", "mktemp", "needs a folder to write in: /no/such/folder"),
        ("ssh:no-such-host.invalid", "Could not resolve", "name a host"),
        ("ssh:-oProxyCommand=x", "names no host", "ssh:USER@HOST"),
    ],
)
def test_a_host_that_cannot_be_used_is_one_clear_error(sshd: Sshd, target: str, found: str, advice: str) -> None:
    with pytest.raises(DeviceError, match=found) as caught, opened(target):
        pass
    assert advice in caught.value.hint


def test_a_key_that_is_not_known_there_is_named(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(sshd.config.read_text().replace(f"{sshd.keys}/user", f"{sshd.keys}/host"))
    monkeypatch.setenv("EDGEFT_SSH_CONFIG", str(tmp_path / "config"))
    with pytest.raises(DeviceError, match="Permission denied") as caught, opened(sshd.target()):
        pass
    assert "ssh-copy-id" in caught.value.hint


def test_a_full_disk_is_said_with_what_is_needed(sshd: Sshd, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted as root")
    try:
        (tmp_path / "model").write_bytes(bytes(3_000_000))
        with opened(f"ssh:edge:{small}") as device:
            assert isinstance(device, SshDevice)
            with pytest.raises(DeviceError, match=r"1\.0 MB free, 3\.0 MB are needed"):
                device.push({"model": tmp_path / "model"})
            ended = device.call(["sh", "-c", "cat /dev/zero > zeros"], heard)  # others fill it while we write
            assert ended.code != 0 and "No space left" in ended.stderr
            with pytest.raises(DeviceError) as caught:
                device.push({"tiny": script(tmp_path, "exit")})
            assert "MB free" in caught.value.message
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_programs_that_do_not_run_there_are_told_apart(sshd: Sshd, tmp_path: Path) -> None:
    program = tmp_path / "edgeft-runner"
    program.write_bytes(AARCH64_ELF)
    program.chmod(0o700)
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        device.push({"edgeft-runner": program})
        with pytest.raises(DeviceError, match="does not start: with code 126") as caught:
            check_runner(device, ["./edgeft-runner"])
        assert "another processor" in caught.value.hint
        device.push({"edgeft-runner": script(tmp_path, "kill -ILL $$")})
        with pytest.raises(DeviceError, match="SIGILL") as caught:
            check_runner(device, ["./edgeft-runner"])
        assert "older level" in caught.value.hint
        device.push({"edgeft-runner": script(tmp_path, """echo '{"runner": 0}'""")})
        with pytest.raises(DeviceError, match="speaks version 0, this edgeft speaks 1") as caught:
            check_runner(device, ["./edgeft-runner"])
        assert "build-runner" in caught.value.hint
        device.push({"edgeft-runner": script(tmp_path, "echo usage")})
        with pytest.raises(DeviceError, match="does not tell its version, it said: usage"):
            check_runner(device, ["./edgeft-runner"])


def test_a_worker_that_is_killed_leaves_its_last_words(sshd: Sshd, tmp_path: Path) -> None:
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        device.push({"edgeft-runner": script(tmp_path, "echo 'row 7' >&2; kill -KILL $$")})
        with pytest.raises(DeviceError, match=r"code 137 \(SIGKILL\)\n  \| row 7") as caught:
            run_job(device, ["./edgeft-runner"], Job(1, 64), tmp_path, heard)
        assert "memory" in caught.value.hint


def test_a_python_without_edgeft_is_told_what_to_install(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEFT_SSH_PYTHON", f"{sys.base_prefix}/bin/python3")
    with opened(sshd.target()) as device, pytest.raises(DeviceError, match="No module named") as caught:
        device.run(Job(1, 64), tmp_path, heard)
    assert "pip install edgeft" in caught.value.hint


def test_a_connection_that_breaks_is_told_from_a_failure_and_leaves_nothing(sshd: Sshd) -> None:
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)

        def drop(line: str) -> None:
            assert sshd.drop_connections() == 1

        with pytest.raises(DeviceLost, match="connection broke"):
            device.call(["sh", "-c", "echo begun; sleep 60"], drop)
        with pytest.raises(DeviceLost):  # it does not connect again by itself
            device.call(["true"], heard)
        assert sshd.left_behind() == []


def test_stopped_from_another_thread_nothing_is_left(sshd: Sshd) -> None:
    with opened(sshd.target()) as device:
        assert isinstance(device, SshDevice)
        with pytest.raises(DeviceError, match="stopped"):
            device.call(["sh", "-c", "echo begun; sleep 60"], lambda line: threading.Thread(target=device.stop).start())
    assert sshd.left_behind() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted_on_this_side_nothing_is_left_there(sshd: Sshd, how: signal.Signals) -> None:
    code = (
        "import sys; from edgeft.bench.devices.device import opened\n"
        "with opened(sys.argv[1]) as d: d.call(['sh', '-c', 'echo begun; sleep 60'], lambda l: print(l, flush=True))"
    )
    argv = [sys.executable, "-c", code, sshd.target()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as edgeft:
        assert edgeft.stdout is not None and edgeft.stdout.readline() == b"begun\n"
        assert len(sshd.left_behind(seconds=0)) > 1
        edgeft.send_signal(how)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert sshd.left_behind() == []
