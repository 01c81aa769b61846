"""Fewer CPU seconds per second for processes that run already: a control group with a quota, version 1 or 2.

Kernel interface: https://docs.kernel.org/scheduler/sched-bwc.html, https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeft.bench.devices.device import DeviceError
from edgeft.bench.like import CGROUPS, new_group, own_group, remove_group

PERIOD_US = 10_000  # short, so that a token does not wait for the next period's share
LEAST_US = 1_000  # the kernel takes no smaller quota


@contextmanager
def slowed(cores: float) -> Iterator[Path]:
    """A group whose processes get so many cores together; `enter` puts them into it, all must have ended at the end.

    Raises DeviceError where no such group can be made.
    """
    quota = max(LEAST_US, round(PERIOD_US * cores))
    reasons = []
    for make in (_v1, _v2):
        try:
            group = make(quota)
        except OSError as error:
            reasons.append(f"{make.__name__[1:]}: {error.strerror or error}")
            continue
        try:
            yield group
        finally:
            remove_group(group)
        return
    raise DeviceError(
        "this machine lets edgeft set no CPU quota\n" + "\n".join(f"  {reason}" for reason in reasons),
        "measure without cpu=; it takes write access to /sys/fs/cgroup (root, as in most containers)",
    )


def enter(group: Path, pids: Iterable[int]) -> None:
    """Put processes into the group with all threads, and what they start later; ended ones are passed over."""
    for pid in pids:
        try:
            (group / "cgroup.procs").write_text(str(pid), "ascii")
        except ProcessLookupError:
            continue


def _v1(quota_us: int) -> Path:
    root = next((CGROUPS / name for name in ("cpu", "cpu,cpuacct") if (CGROUPS / name).is_dir()), None)
    if root is None:
        raise OSError(0, "no CPU controller of version 1 is mounted")
    group = new_group(root, own_group("cpu"))
    try:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US), "ascii")
        (group / "cpu.cfs_quota_us").write_text(str(quota_us), "ascii")
    except OSError:
        remove_group(group)
        raise
    return group


def _v2(quota_us: int) -> Path:
    own = CGROUPS / own_group("").lstrip("/")
    allowed = own / "cgroup.subtree_control"
    if not allowed.is_file() or "cpu" not in allowed.read_text("ascii").split():
        raise OSError(0, "the own group of version 2 hands no CPU controller down")
    group = new_group(CGROUPS, own_group(""))
    try:
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}", "ascii")
    except OSError:
        remove_group(group)
        raise
    return group
