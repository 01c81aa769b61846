"""A process on this machine with no more memory than a device gives an app: a control group, v1, v2 or systemd's.

The new group lies below the one that this process is in, so limits that are already there keep holding.
Kernel interfaces: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, .../cgroup-v2.html
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import EdgeftError

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
LEAVE_S = 2.0  # the kernel takes a moment until a group whose last process ended counts as empty
TELLS = "It tells whether the package loads, runs and answers in that memory, and with which accuracy."
TELLS_NOT = (
    "It does not tell the device's speed (this CPU and its memory are not the device's; `edgeft devices PACKAGE "
    "--device NAME` predicts it), nor heat, GPU, what else the device is doing, or the rounding of its kernels."
)


@dataclass(frozen=True)
class Confinement:
    """How a command is started so that the limit holds, and what was seen of it afterwards."""

    prefix: tuple[str, ...]  # stands before the command
    how: str
    group: Path | None  # None: systemd removes its group with the last process

    def peak_bytes(self) -> int | None:
        """Most memory that was charged to the group; None where the kernel or systemd does not keep it."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.group and (self.group / name).is_file():
                return int((self.group / name).read_text("ascii"))
        return None

    def was_full(self) -> bool:
        """Whether the kernel killed a process of the group for want of memory."""
        for name in ("memory.oom_control", "memory.events"):
            if self.group and (self.group / name).is_file():
                counts = dict(line.split() for line in (self.group / name).read_text("ascii").splitlines())
                return int(counts.get("oom_kill", 0)) > 0
        return False


@contextmanager
def confined(memory_bytes: int) -> Iterator[Confinement]:
    """A group with a limit of so many bytes, removed afterwards. Raises EdgeftError where no limit can be set."""
    reasons: list[str] = []
    for make in (_v1, _v2, _systemd):
        try:
            found = make(memory_bytes)
        except OSError as error:
            reasons.append(f"{make.__name__[1:]}: {error.strerror or error}")
            continue
        try:
            yield found
        finally:
            remove_group(found.group)
        return
    raise EdgeftError(
        "this machine lets edgeft set no memory limit\n" + "\n".join(f"  {reason}" for reason in reasons),
        "it takes Linux with systemd (any user) or write access to /sys/fs/cgroup (root, as in most containers)",
    )


def forget_cached(folder: Path) -> None:
    """Drop a package's files from the page cache: pages that are in it already would be charged to nobody."""
    for path in folder.glob("model*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _v1(memory_bytes: int) -> Confinement:
    root = CGROUPS / "memory"
    if not (root / "memory.limit_in_bytes").is_file():
        raise OSError(0, "no memory controller of version 1 is mounted")
    group = new_group(root, own_group("memory"))
    with _removed_on_error(group):
        (group / "memory.limit_in_bytes").write_text(str(memory_bytes), "ascii")
        with_swap = group / "memory.memsw.limit_in_bytes"
        if with_swap.is_file():
            with_swap.write_text(str(memory_bytes), "ascii")
    return Confinement(_join(group), "control group, version 1", group)


def _v2(memory_bytes: int) -> Confinement:
    own = CGROUPS / own_group("").lstrip("/")
    allowed = own / "cgroup.subtree_control"
    if not allowed.is_file() or "memory" not in allowed.read_text("ascii").split():
        raise OSError(0, "the own group of version 2 hands no memory controller down")
    group = new_group(CGROUPS, own_group(""))
    with _removed_on_error(group):
        (group / "memory.max").write_text(str(memory_bytes), "ascii")
        if (group / "memory.swap.max").is_file():
            (group / "memory.swap.max").write_text("0", "ascii")
    return Confinement(_join(group), "control group, version 2", group)


def _systemd(memory_bytes: int) -> Confinement:
    if shutil.which("systemd-run") is None:
        raise OSError(0, "systemd-run is not installed")
    user = [] if os.geteuid() == 0 else ["--user"]
    limits = ["-p", f"MemoryMax={memory_bytes}", "-p", "MemorySwapMax=0"]
    prefix = ("systemd-run", *user, "--scope", "--quiet", "--collect", *limits, "--")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise OSError(0, (tried.stderr.strip().splitlines() or ["systemd-run failed"])[-1])
    return Confinement(prefix, "systemd scope", None)


def own_group(controller: str) -> str:
    """Path of this process's group for a v1 controller, or with '' in the v2 hierarchy."""
    if not OWN.is_file():
        raise OSError(0, "the system has no control groups")
    for line in OWN.read_text("ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    raise OSError(0, f"this process is in no group of {controller or 'version 2'}")


def new_group(root: Path, own: str) -> Path:
    """An empty group of a new name below the one at `own` in the hierarchy at `root`. Raises OSError."""
    group = root / own.lstrip("/") / f"edgeft-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    return group


def _join(group: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "edgeft.bench.join", str(group))


@contextmanager
def _removed_on_error(group: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove_group(group)
        raise


def remove_group(group: Path | None) -> None:
    """Remove a group whose processes have ended. Raises OSError if one is still there after some seconds."""
    deadline = time.monotonic() + LEAVE_S
    while group and group.is_dir():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
