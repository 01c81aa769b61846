"""What can be measured on from here now. Nothing is connected to but the adb server on this machine."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from edgeft.bench.devices.adb import find_adb, listing
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.host import host_facts

Found = tuple[str, str, str]  # target, state, what it is
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
ADB_S = 10.0


def scan() -> list[Found]:
    """A line for each target: what `edgeft bench --target` takes, whether it is ready, and what it is."""
    host = host_facts()
    cores = f"{host['cores_physical']} cores, {host['ram_bytes'] / 1e9:.1f} GB"
    found: list[Found] = [("local", "ready", f"{host['cpu'] or platform.machine()}, {cores}")]
    found += [(f"ssh:{name}", "not asked", "in ~/.ssh/config") for name in ssh_hosts()]
    found += _phones()
    found.append(("browser", *_browser()))
    qemu = _first(QEMU)
    found.append(("arm64", "emulated" if qemu else "no emulator", qemu or "install qemu-user-static"))
    return found


def ssh_hosts() -> list[str]:
    """Names of ssh's settings, and of the files they include, that are no patterns."""
    from edgeft.bench.devices.ssh import CONFIG

    start = Path(os.environ.get(CONFIG) or Path.home() / ".ssh" / "config")
    return list(dict.fromkeys(_hosts_in(start, depth=0)))


def _hosts_in(path: Path, depth: int) -> Iterator[str]:
    if not path.is_file() or depth > 4:
        return
    for line in path.read_text("utf-8", errors="replace").splitlines():
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        words = rest.split()
        if keyword.lower() == "host":
            yield from (word for word in words if not set(word) & set("*?!"))
        elif keyword.lower() == "include":
            base = Path.home() / ".ssh"
            for word in words:
                named = Path(word).expanduser()
                for file in sorted(named.parent.glob(named.name) if named.is_absolute() else base.glob(word)):
                    yield from _hosts_in(file, depth + 1)


def _phones() -> list[Found]:
    try:
        adb = find_adb()
    except DeviceError as error:
        return [("android:SERIAL", "no adb", error.hint)]
    try:
        phones = phones_in(listing(adb, ["-l"], ADB_S))
    except DeviceError as error:
        return [("android:SERIAL", "adb fails", f"{error.message}: adb kill-server, then try again")]
    return phones or [("android:SERIAL", "no phone", "plug one in and allow USB debugging on its screen")]


def phones_in(listed: str) -> list[Found]:
    """The lines of `adb devices -l`."""
    advice = {
        "unauthorized": "allow USB debugging on its screen", "offline": "plug it in again",
        "no permissions": "give your user access to USB devices",
    }  # fmt: skip
    found = []
    for line in listed.splitlines()[1:]:
        serial, *words = line.split()[:1] + line.split()[1:] or [""]
        if words and not serial.startswith("*"):
            named = dict(word.split(":", 1) for word in words[1:] if ":" in word)
            state = {"device": "ready", "no": "no permissions"}.get(words[0], words[0])
            found.append((f"android:{serial}", state, advice.get(state, named.get("model", ""))))
    return found


def _browser() -> tuple[str, str]:
    """State and program of the browser: ready if it, what drives it and a runtime for its pages are there."""
    from edgeft.bench.devices.browser import find_chromium
    from edgeft.bench.devices.web_runtimes import find_runtime

    try:
        program = find_chromium()
    except DeviceError as error:
        return "no browser", error.hint
    if not find_spec("playwright"):
        return "no Playwright", "pip install 'edgeft[browser]'"
    reasons = []
    for fmt in ("gguf", "onnx"):
        try:
            find_runtime(fmt)
        except DeviceError as error:
            reasons.append(error.hint)
    return ("no runtime", reasons[0]) if len(reasons) == 2 else ("ready", str(program))


def _first(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)
