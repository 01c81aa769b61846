"""A phone over adb: the native runner in a private folder below /data/local/tmp, where programs may run.

A folder that stayed, since the cable was pulled or edgeft was killed, is removed at the next connection: its name tells
the machine and the process that made it.

Commands are argument lists here; on the phone adb hands them to its shell, every argument quoted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.artifact import file_sha256
from edgeft.bench.devices.adb import READY, chosen, find_adb, is_address, phones, run_adb
from edgeft.bench.devices.android_facts import ANDROID_PROBE, android_facts, energy
from edgeft.bench.devices.child import Children, ignore
from edgeft.bench.devices.device import DeviceError, DeviceLost, OnLine, cleaned_up_after_errors
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.linux import sections_of
from edgeft.bench.devices.native import better_runner, find_runner
from edgeft.bench.devices.private import is_left, is_own, private_name
from edgeft.bench.devices.shell import MODEL_NAME, RUNNER_NAME, Exit, check_runner, run_job

ROOM = "/data/local/tmp"
ARGV = (f"./{RUNNER_NAME}", MODEL_NAME)
_IN_USE: dict[str, str] = {}  # this process's folders on phones that it measures -> serial
_CONNECTED: set[str] = set()  # serials that this process told adb to connect to
PID = "pid"  # file with the number of the process that was started last
CUT = 255  # adb's exit code if the connection ends before the command
SPARE_BYTES = 32 << 20  # that must stay free beside what is sent: logits, results
# Ends the process that was started last, if it is still ours.
KILL = (
    f'p=$(cat {PID} 2>/dev/null) && grep -q {RUNNER_NAME} "/proc/$p/cmdline" 2>/dev/null && kill -9 "$p" 2>/dev/null; '
    "true"
)


def open_android(address: str) -> AndroidDevice:
    """The phone with the serial (or HOST:PORT) `address`, or the only one for ''; the runner is on it and works.

    Raises DeviceError if it is not there, not allowed, or cannot run it.
    """
    adb = find_adb()
    seen = phones(adb)
    if is_address(address) and seen.get(address) != READY:
        said = run_adb(adb, ["connect", address]).stdout.strip()
        seen = phones(adb)
        if address not in seen:
            raise DeviceError(f"adb cannot reach {address}: {said}", "look at the address in Wireless debugging")
        _CONNECTED.add(address)
    device = AndroidDevice(adb, chosen(seen, address))
    with cleaned_up_after_errors(device):
        device.prepare()
    return device


class AndroidDevice:
    """`Device` and `Shell` of one phone."""

    kind = "android"
    emulated = False
    formats = frozenset({"gguf"})

    def __init__(self, adb: str, serial: str) -> None:
        self.name = self.place = f"android:{serial}"
        self.folder = f"{ROOM}/{private_name()}"
        self._adb, self._serial = adb, serial
        self._children = Children(self.name)
        self._there = False  # whether the folder may be there
        self._better: str | None = None  # see `native.better_runner`

    def prepare(self) -> None:
        """Make the folder, choose the runner that fits the processor, and try it."""
        if "shell_v2" not in run_adb(self._adb, ["-s", self._serial, "features"]).stdout.split():
            raise DeviceError(f"{self.name}: the phone tells no exit codes", "Android 7 or newer is needed")
        self._there = True
        _IN_USE[self.folder] = self._serial
        made = self._shell(shlex.join(["mkdir", "-m", "700", self.folder]))
        if made.code != 0:
            raise DeviceError(f"{self.name}: cannot make {self.folder}: {made.stderr.strip()}", _hint(made.stderr))
        self._sweep()
        self.place = f"android:{self._own_serial()}"
        facts = self.probe()
        machine, features = facts["machine"] or "an unknown machine", facts["cpu_features"] or ()
        self.push({RUNNER_NAME: find_runner(machine, "android", features)})
        self._better = better_runner(machine, features, "android")
        check_runner(self, ARGV[:1])

    def probe(self) -> dict[str, Any]:
        lines: list[str] = []
        self._checked(self.call(["sh", "-c", ANDROID_PROBE], lines.append))
        return android_facts(sections_of(lines))

    def call(self, argv: Sequence[str], on_line: OnLine) -> Exit:
        return self._shell(f"cd {shlex.quote(self.folder)} && echo $$ > {PID} && exec {shlex.join(argv)}", on_line)

    def push(self, files: Mapping[str, Path]) -> None:
        there = self._digests(list(files))
        missing = {name: path for name, path in files.items() if there.get(name) != file_sha256(path)}
        self._make_sure_of_room(sum(path.stat().st_size for path in missing.values()))
        for name, path in missing.items():
            self._checked(self._run(["push", str(path), f"{self.folder}/{name}"]))
            if os.access(path, os.X_OK):
                self._checked(self.call(["chmod", "700", name], ignore))

    def pull(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if self.call(["test", "-f", name], ignore).code == 0:
                self._checked(self._run(["pull", f"{self.folder}/{name}", str(folder / name)]))

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        """As `Device.run`; a timed job also has "energy" (`android_facts.energy`) and "better_runner" (`native`)."""
        charging = (self.probe()["battery"] or {}).get("charging") if job.speed else None
        out = run_job(self, ARGV, job, scratch, on_line)
        if job.speed:
            out["energy"] = energy(out.get("trace", ()), out["samples"], charging)
            out["better_runner"] = self._better
        return out

    def stop(self) -> None:
        self._children.stop()
        if self._there:
            run_adb(self._adb, ["-s", self._serial, "shell", f"cd {shlex.quote(self.folder)} && {{ {KILL}; }}"])

    def clean_up(self) -> None:
        if not self._there:
            return
        self._children.go_on()
        _IN_USE.pop(self.folder, None)
        try:
            gone = self._shell(removal(self.folder)).code == 0
        except DeviceLost:
            gone = False
        if self._serial in _CONNECTED and self._serial not in _IN_USE.values():  # the last one that uses it
            run_adb(self._adb, ["disconnect", self._serial])
            _CONNECTED.discard(self._serial)
        if not gone:
            raise DeviceError(
                f"{self.name}: {self.folder} may still be on the phone",
                f"when it is back: adb -s {self._serial} shell rm -rf {self.folder}",
            )
        self._there = False

    def _sweep(self) -> None:
        """Remove what connections that ended early left, and nothing that is in use."""
        names: list[str] = []
        self._shell(f"ls {ROOM}", names.append)
        for name in names:
            if is_left(name) or (is_own(name) and f"{ROOM}/{name}" not in _IN_USE):
                self._shell(removal(f"{ROOM}/{name}"))

    def _own_serial(self) -> str:
        """What the phone calls itself: one that is reached by cable and over a network is measured once at a time."""
        told: list[str] = []
        self._shell("getprop ro.serialno", told.append)
        return told[0].strip() if told and told[0].strip() else self._serial

    def _digests(self, names: Sequence[str]) -> dict[str, str]:
        """sha256 of those files that are there."""
        lines: list[str] = []
        self.call(["sha256sum", *names], lines.append)
        pairs = (line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
        return {name: digest for digest, name in pairs}

    def _make_sure_of_room(self, needed: int) -> None:
        lines: list[str] = []
        self.call(["df", "-Pk", "."], lines.append)
        fields = lines[-1].split() if lines else []
        free = int(fields[3]) * 1024 if len(fields) > 4 and fields[3].isdigit() else None
        if needed and free is not None and free < needed + SPARE_BYTES:
            raise DeviceError(
                f"{self.name}: {needed / 1e6:.0f} MB are to be sent and only {free / 1e6:.0f} MB are free",
                f"free {(needed + SPARE_BYTES - free) / 1e6:.0f} MB on the phone, or take a smaller type",
            )

    def _shell(self, command: str, on_line: OnLine = ignore) -> Exit:
        """One command line in the phone's shell. Raises DeviceLost if the phone is gone afterwards."""
        return self._run(["shell", command], on_line)

    def _run(self, arguments: Sequence[str], on_line: OnLine = ignore) -> Exit:
        ended = self._children.run([self._adb, "-s", self._serial, *arguments], on_line)
        if ended.code != 0:
            state = run_adb(self._adb, ["-s", self._serial, "get-state"])
            if state.stdout.strip() != READY or (ended.code == CUT and not ended.stderr.strip()):
                said = (state.stderr.strip() or ended.stderr.strip()).splitlines()
                raise DeviceLost(
                    f"{self.name}: the connection broke" + (f": {said[-1]}" if said else ""),
                    "plug the phone in again and run the same command: it goes on where it stopped",
                )
        return ended

    def _checked(self, ended: Exit) -> None:
        if ended.code != 0:
            raise DeviceError(f"{self.name}: {ended.stderr.strip() or f'code {ended.code}'}", _hint(ended.stderr))


def removal(folder: str) -> str:
    """A command that ends what runs in a folder on the phone and removes it; it fails if the folder stays."""
    quoted = shlex.quote(folder)
    return f"cd {quoted} 2>/dev/null && {{ {KILL}; }}; cd /; rm -rf {quoted}; test ! -e {quoted}"


def _hint(stderr: str) -> str:
    """What to do about an error of the phone's file system."""
    text = stderr.lower()
    if "no space" in text or "enospc" in text:
        return "the phone is full: free space on it, or take a smaller type"
    if "key not available" in text or "enokey" in text:
        return "unlock the phone once after it has started: its storage is still encrypted"
    if "read-only" in text or "permission denied" in text:
        return "the phone lets no programs into this folder: a work profile or its maker may forbid it"
    return "look at the phone: adb shell"
