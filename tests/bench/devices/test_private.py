"""What processes that were killed left behind goes, and what others work with does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgeft.bench.devices.local import LocalDevice
from edgeft.bench.devices.private import OURS, is_left, is_own, private_folder, private_name
from tests.bench.devices.conftest import ROOT

BUSY = (
    "from edgeft.bench.devices.local import LocalDevice\n"
    "device = LocalDevice()\n"
    "device.call(['sh', '-c', 'echo $$ $PWD; exec sleep 60'], lambda line: print(line, flush=True))"
)


def test_folders_of_processes_that_are_gone_are_told_from_those_at_work() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert is_left(f"{OURS}{gone.pid}-00ff00ff")
    assert is_own(private_name()) and not is_left(private_name())
    assert not is_left(f"{OURS}{os.getppid()}-00ff00ff"), "its process is at work"
    assert not is_left(f"edgeft-00000000-{gone.pid}-00ff00ff") or OURS == "edgeft-00000000-", "another machine's"
    assert not any(map(is_left, (OURS, f"{OURS}x-1", "edgeft-0123456789ab", "tmp")))


def test_a_killed_process_leaves_a_folder_and_a_worker_that_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-c", BUSY]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, text=True) as edgeft:
        assert edgeft.stdout is not None
        worker, folder = edgeft.stdout.readline().split()
        living = LocalDevice()
        assert Path(folder).is_dir(), "it is at work"
        edgeft.send_signal(signal.SIGKILL)
        edgeft.wait()
        assert psutil.pid_exists(int(worker)), "the test needs a worker that outlives it"
        private = Path(private_folder())
    assert not Path(folder).exists() and wait_for(lambda: not_running(int(worker)))
    assert Path(living.folder).is_dir() and private.stat().st_mode & 0o777 == 0o700
    living.clean_up()
    private.rmdir()


def test_a_link_with_such_a_name_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"{OURS}{gone.pid}-x").symlink_to(tmp_path / "theirs")
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path / "theirs") as there:
        private_folder()
        assert there.poll() is None and (tmp_path / "theirs").is_dir()
        there.kill()


def not_running(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
