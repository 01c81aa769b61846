"""The program `adb`: where it is, which phones it sees, and which of them is meant."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from edgeft.bench.devices.device import DeviceError

READY = "device"  # adb's word for a phone that takes commands
TIMEOUT_S = 30.0
HELP = {
    "unauthorized": "unlock the phone and allow USB debugging for this computer in the dialog it shows",
    "authorizing": "wait a moment, then unlock the phone and allow USB debugging for this computer",
    "offline": "plug it in again, or: adb reconnect offline",
    "connecting": "wait a moment and try again",
    "recovery": "start the phone into Android",
    "sideload": "start the phone into Android",
    "bootloader": "start the phone into Android",
    "no permissions": "give your user access to USB devices (udev rules, Debian: android-sdk-platform-tools-common)",
}  # fmt: skip


def find_adb() -> str:
    """On the PATH, or the one that comes with the package adbutils. Raises DeviceError if there is none."""
    if found := shutil.which("adb"):
        return found
    spec = find_spec("adbutils")
    bundled = Path(spec.origin).parent / "binaries" / "adb" if spec and spec.origin else None
    if bundled and bundled.is_file():
        return str(bundled)
    raise DeviceError("adb was not found", "pip install 'edgeft[devices]', or install Android's platform tools")


def run_adb(adb: str, arguments: Sequence[str], timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """One short command of adb. Raises DeviceError if it does not end in time."""
    try:
        return subprocess.run(
            [adb, *arguments], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"`adb {' '.join(arguments)}` gave no answer in {timeout_s:.0f} s", "plug the phone in again"
        ) from None


def listing(adb: str, options: Sequence[str] = (), timeout_s: float = TIMEOUT_S) -> str:
    """What `adb devices` prints. Raises DeviceError if its server cannot be reached or started."""
    listed = run_adb(adb, ["devices", *options], timeout_s)
    if listed.returncode != 0:
        said = (listed.stderr.strip() or listed.stdout.strip()).splitlines()
        raise DeviceError(f"adb does not work: {said[-1] if said else f'code {listed.returncode}'}", "adb kill-server")
    return listed.stdout


def phones(adb: str) -> dict[str, str]:
    """{serial: state} of all that adb sees. Raises DeviceError as `listing` does."""
    return phones_in(listing(adb))


def phones_in(listing: str) -> dict[str, str]:
    """{serial: state} out of what `adb devices` prints."""
    phones = {}
    for line in listing.splitlines():
        serial, tab, state = line.partition("\t")
        if tab and not line.startswith("*"):
            phones[serial.strip()] = "no permissions" if state.startswith("no permissions") else state.strip()
    return phones


def chosen(phones: Mapping[str, str], serial: str) -> str:
    """The serial of the phone that is meant: the one called so or, for '', the only one. It is ready.

    Raises DeviceError if there is none, more than one, or it takes no commands, with what to do about it.
    """
    if serial and serial not in phones:
        seen = ", ".join(sorted(phones)) or "none"
        raise DeviceError(f"adb sees no phone called {serial!r}; it sees: {seen}", "name one of these, or plug it in")
    if not phones:
        raise DeviceError(
            "adb sees no phone",
            "plug it in and switch on USB debugging in its developer options; over Wi-Fi: android:ADDRESS:PORT",
        )
    ready = [name for name, state in phones.items() if state == READY]
    if not serial and len(phones) > 1 and len(ready) != 1:
        raise DeviceError(f"adb sees {len(phones)} phones: {', '.join(sorted(phones))}", "name one: android:SERIAL")
    found = serial or (ready[0] if ready else next(iter(phones)))
    if phones[found] != READY:
        raise DeviceError(
            f"the phone {found} takes no commands: adb calls it {phones[found]!r}",
            HELP.get(phones[found], "start the phone anew and look at it: adb devices"),
        )
    return found


def is_address(serial: str) -> bool:
    """Whether a serial is the HOST:PORT of a phone that is reached over a network."""
    host, _, port = serial.rpartition(":")
    return bool(host) and port.isdigit()
