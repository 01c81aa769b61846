"""What goes wrong between a phone and its driver, with an adb that runs everything on this machine and can lose it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeft.bench.devices import android, scan
from edgeft.bench.devices.android import AndroidDevice
from edgeft.bench.devices.device import DeviceError, DeviceLost, opened
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.private import OURS

ADB = r"""#!/bin/sh
if [ "$1" = devices ]; then printf 'List of devices attached\nS1\tdevice\nS2\tdevice\n'; exit; fi
shift 2  # -s S1
[ "$1" = features ] && echo shell_v2 && exit
if [ -e "@/gone" ]; then echo "error: device 'S1' not found" >&2; exit 1; fi
case "$1" in
  get-state) echo device;;
  shell) sh -c "$2"; code=$?; [ -e "@/gone" ] && exit 255; exit $code;;
  push) cp "$2" "$3";;
  pull) cp "$2" "$3";;
esac
"""
NETWORK = r"""#!/bin/sh
case "$1" in
  connect) touch "@/connected";;
  disconnect) rm "@/connected";;
  devices) echo 'List of devices attached'; [ ! -e "@/connected" ] || printf '10.0.0.7:5555\tdevice\n';;
  *) exec "@/cable" "$1" "$2" "$3" "$4" "$5";;
esac
"""
RUNNER = '#!/bin/sh\n[ "$1" = --version ] && echo \'{"runner": 1}\' && exit\ntouch "@/gone"\n'


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The phone's folder for programs; `tmp_path / "gone"` makes the phone vanish, as its runner's first job does."""
    room = tmp_path / "room"
    room.mkdir()
    program(tmp_path / "adb", ADB)
    program(tmp_path / "runner", RUNNER)
    monkeypatch.setattr(android, "ROOM", str(room))
    monkeypatch.setattr(android, "find_adb", lambda: str(tmp_path / "adb"))
    monkeypatch.setattr(android, "find_runner", lambda *asked: tmp_path / "runner")
    monkeypatch.setattr(android, "better_runner", lambda *asked: None)
    yield room


def program(path: Path, text: str) -> None:
    path.write_text(text.replace("@", str(path.parent)))
    path.chmod(0o700)


def test_a_phone_that_is_lost_in_a_job_is_lost_and_its_folder_goes_at_the_next_connection(
    room: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeviceLost, match="the connection broke") as lost, opened("android:S1") as device:
        device.run(Job(1, 64), tmp_path, lambda line: None)
    [left] = room.iterdir()
    assert left.name.startswith(OURS) and f"rm -rf {left}" in lost.value.hint
    (tmp_path / "gone").unlink()
    with opened("android:S1") as device:
        assert isinstance(device, AndroidDevice) and [path.name for path in room.iterdir()] == [
            Path(device.folder).name
        ]
    assert list(room.iterdir()) == []


def test_a_phone_that_is_lost_while_it_is_prepared_is_lost_too(room: Path, tmp_path: Path) -> None:
    program(tmp_path / "runner", f'#!/bin/sh\ntouch "{tmp_path}/gone"\n')
    with pytest.raises(DeviceLost, match="the connection broke"), opened("android:S1"):
        pass


def test_other_errors_of_a_phone_leave_nothing_on_it(room: Path, tmp_path: Path) -> None:
    program(tmp_path / "runner", "#!/bin/sh\nexit 132\n")
    with pytest.raises(DeviceError, match="SIGILL") as caught, opened("android:S1"):
        pass
    assert not isinstance(caught.value, DeviceLost) and list(room.iterdir()) == []


def test_one_phone_under_two_names_is_measured_once_at_a_time_and_keeps_both_folders(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "getprop", "#!/bin/sh\necho 39281FDJ\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with opened("android:S1") as first, opened("android:S2") as second:
        assert first.place == second.place == "android:39281FDJ"
        assert len(list(room.iterdir())) == 2, "the second connection took the first one's folder"
    assert list(room.iterdir()) == []


def test_a_phone_over_a_network_stays_connected_until_the_last_target_is_done(room: Path, tmp_path: Path) -> None:
    connected = tmp_path / "connected"
    program(tmp_path / "cable", ADB)
    program(tmp_path / "adb", NETWORK)
    with opened("android:10.0.0.7:5555") as first, opened("android:") as second:
        assert first.name == second.name and connected.exists()
        first.clean_up()
        assert connected.exists(), "the first target cut the second one's connection"
    assert not connected.exists() and list(room.iterdir()) == []


def test_the_folder_of_another_process_that_lives_stays(room: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        folder = room / f"{OURS}{living.pid}-00ff00ff"
        folder.mkdir()
        with opened("android:S1"):
            assert folder.exists()


def test_the_scan_tells_why_adb_does_not_work(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "adb", "#!/bin/sh\necho 'cannot bind to 127.0.0.1:5037' >&2\nexit 1\n")
    monkeypatch.setattr(scan, "find_adb", lambda: str(tmp_path / "adb"))
    [(_, state, what)] = [line for line in scan.scan() if line[0].startswith("android")]
    assert state == "adb fails" and "cannot bind" in what


def test_an_adb_that_does_not_work_is_no_missing_phone(room: Path, tmp_path: Path) -> None:
    program(tmp_path / "adb", "#!/bin/sh\necho 'cannot bind to 127.0.0.1:5037' >&2\nexit 1\n")
    with pytest.raises(DeviceError, match="adb does not work: cannot bind"), opened("android:S1"):
        pass


def test_what_a_killed_process_left_running_on_a_phone_ends_at_the_next_connection(room: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = room / f"{OURS}{gone.pid}-00ff00ff"
    left.mkdir()
    (left / "edgeft-runner").symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen(["./edgeft-runner", "60"], cwd=left) as runner:
        (left / "pid").write_text(str(runner.pid))
        with opened("android:S1"):
            assert runner.wait(timeout=5) != 0 and not left.exists()
