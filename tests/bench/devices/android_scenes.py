"""`... android_scenes MODEL JOB OUT`: what happens to a phone's driver, beside a real adbd; written as JSON into OUT.

Runs where only that phone can be seen (see adbd.py), with an adb server of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft.bench.devices.adb import find_adb, run_adb
from edgeft.bench.devices.android import ROOM, AndroidDevice, open_android
from edgeft.bench.devices.child import ignore
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.job import Job, SpeedJob, job_of
from edgeft.bench.devices.private import OURS

SERIAL = f"127.0.0.1:{os.environ['TEST_ADBD_PORT']}"
SAME_PHONE = SERIAL.replace("127.0.0.1", "localhost")
LONG = SpeedJob([5] * 40, 20_000, 50)  # nobody waits for its end


def said(action: Callable[[], Any]) -> list[str]:
    """Kind and text of the error that it ends with."""
    try:
        action()
    except DeviceError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


@contextmanager
def phone(model: Path) -> Iterator[AndroidDevice]:
    device = open_android(SERIAL)
    try:
        device.push({"model.gguf": model})
        yield device
    finally:
        device.clean_up()


def left_behind() -> list[str]:
    """Files and processes of ours on the phone."""
    files = run_adb(find_adb(), ["-s", SERIAL, "shell", f"ls -A {ROOM}"]).stdout.split()
    return [*files, *(f"process {pid}" for pid in runners())]


def runners() -> list[int]:
    """The phone's processes are those of this namespace."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if b"./edgeft-runner\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def works(model: Path, job: Job, scratch: Path) -> dict[str, Any]:
    """A package is measured; what is there already is not sent again. The logits stay in a folder of their own."""
    lines, kept = list[str](), scratch / "works"
    kept.mkdir()
    with phone(model) as device:
        facts = device.probe()
        out = device.run(job, kept, lines.append)
        sent = time.monotonic()
        device.push({"model.gguf": model})
        timed = device.run(
            replace(job, rows=(), forced=(), logits=None, speed=SpeedJob([5] * 8, 2, 2)), scratch, ignore
        )
        folder = run_adb(find_adb(), ["-s", SERIAL, "shell", f"ls {device.folder}"]).stdout.split()
    return {
        "facts": facts, "out": out, "progress": lines, "samples": timed["samples"], "energy": timed["energy"],
        "folder": folder, "left": left_behind(), "again_s": time.monotonic() - sent,
    }  # fmt: skip


def swept(model: Path) -> list[Any]:
    """What a process that is gone has left goes at the next connection; what others have does not."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, foreign = f"{ROOM}/{OURS}{gone.pid}-00ff00ff", f"{ROOM}/edgeft-{'0' * 8}-{gone.pid}-00ff00ff"
    shell = [find_adb(), "-s", SERIAL, "shell"]
    subprocess.run([*shell, f"mkdir {left} {foreign}; touch {left}/model.gguf"], check=True)
    with phone(model):
        there = subprocess.run([*shell, f"ls {ROOM}"], check=True, capture_output=True, text=True).stdout.split()
    subprocess.run([*shell, f"rmdir {foreign}"], check=True)
    return [Path(left).name in there, Path(foreign).name in there]


def ends(model: Path, job: Job, scratch: Path, how: Callable[[AndroidDevice], Any]) -> list[Any]:
    """`how` ends a long job while it runs."""
    with phone(model) as device:
        threading.Timer(4.0, how, (device,)).start()
        words = said(lambda: device.run(replace(job, speed=LONG), scratch, ignore))
    return [*words, left_behind()]


def kill_runner(device: AndroidDevice) -> None:
    for pid in runners():
        os.kill(pid, signal.SIGKILL)


def is_full(model: Path, scratch: Path) -> list[Any]:
    large = scratch / "large.gguf"
    with large.open("wb") as f:
        f.truncate(300 << 20)
    with phone(model) as device:
        words = said(lambda: device.push({"large.gguf": large}))
    return [*words, left_behind()]


def two_phones() -> list[str]:
    run_adb(find_adb(), ["connect", SERIAL])
    run_adb(find_adb(), ["connect", SAME_PHONE])
    words = said(lambda: open_android(""))
    run_adb(find_adb(), ["disconnect", SAME_PHONE])
    return words


def is_lost(model: Path, job: Job, scratch: Path) -> list[Any]:
    """The phone goes away for good in the middle of a job; so this comes last."""
    device = open_android(SERIAL)
    device.push({"model.gguf": model})
    threading.Timer(4.0, os.kill, (int(os.environ["TEST_ADBD_PID"]), signal.SIGKILL)).start()
    lost = said(lambda: device.run(replace(job, speed=LONG), scratch, ignore))
    return [*lost, said(device.clean_up)]


def main(model: Path, job_file: Path, out: Path) -> None:
    job, scratch = job_of(job_file.read_text()), out.parent
    for arguments in (["connect", SERIAL], ["-s", SERIAL, "wait-for-device"]):  # on a busy machine it is offline first
        run_adb(find_adb(), arguments)
    found: dict[str, Any] = {"works": works(model, job, scratch)}
    found["swept"] = swept(model)
    found["killed"] = ends(model, job, scratch, kill_runner)
    found["stopped"] = ends(model, job, scratch, AndroidDevice.stop)
    found["full"] = is_full(model, scratch)
    found["two"] = two_phones()
    found["lost"] = is_lost(model, job, scratch)
    found["nobody"] = said(lambda: open_android("127.0.0.1:1"))
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    finally:
        subprocess.run([find_adb(), "kill-server"], capture_output=True)
