"""Private folders: their names tell the machine and the process that made them, so what a killed one left can go."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import psutil

# Numbers of processes mean something within one machine, on Linux within one namespace of it.
_NUMBERS = Path("/proc/self/ns/pid")
_MACHINE = platform.node() + (os.readlink(_NUMBERS) if _NUMBERS.is_symlink() else "")
OURS = f"edgeft-{sha256(_MACHINE.encode()).hexdigest()[:8]}-"  # how folders of this machine's processes begin


def private_name() -> str:
    """A new name for a folder of this process."""
    return f"{OURS}{os.getpid()}-{secrets.token_hex(4)}"


def is_own(name: str) -> bool:
    """Whether a folder is of this process."""
    return name.startswith(f"{OURS}{os.getpid()}-")


def is_left(name: str) -> bool:
    """Whether a folder is of a process of this machine that is gone."""
    pid = name.removeprefix(OURS).partition("-")[0]
    return name.startswith(OURS) and pid.isdigit() and not psutil.pid_exists(int(pid))


def private_folder() -> str:
    """A new folder on this machine for its user alone; what killed processes left goes, with what works in it."""
    room = Path(tempfile.gettempdir())
    for folder in room.glob(f"{OURS}*"):
        if is_left(folder.name) and not folder.is_symlink():  # a link may be anybody's and lead anywhere
            _end_all_in(folder)
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays, and must not stop this one's work
    return tempfile.mkdtemp(prefix=f"{OURS}{os.getpid()}-")


def _end_all_in(folder: Path) -> None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder.resolve()):
                process.kill()
                process.wait(timeout=5)
