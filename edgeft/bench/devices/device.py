"""The seam between the host and a device: something that takes a package and runs jobs on it, far from here or near."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from edgeft.bench.devices.job import Job
from edgeft.errors import EdgeftError

OnLine = Callable[[str], None]  # hears of each line that a runner prints, without its end
HERE = "here"  # the `place` of everything that computes on this machine


class Device(Protocol):
    """A machine, or a part of this one, that runs jobs. Nothing crosses the wire inside a timed loop.

    All it writes lies in one private folder of its own with a random name.
    """

    @property
    def name(self) -> str:
        """The target as it was typed: 'ssh:pi@board'."""

    @property
    def kind(self) -> str:
        """The target's scheme: 'ssh'."""

    @property
    def emulated(self) -> bool:
        """Whether its timings say nothing about any real device."""

    @property
    def place(self) -> str:
        """What two targets must not share while they measure: a machine. `HERE` for this one, '' if nobody knows."""

    @property
    def formats(self) -> frozenset[str]:
        """Of packages that it runs: 'gguf', 'onnx'."""

    def probe(self) -> dict[str, Any]:
        """The machine and its state now, in the shape of `facts.FIELDS`; null has its reason in "absent"."""

    def push(self, files: Mapping[str, Path]) -> None:
        """Bring files there, by their names there (relative, '/' between parts); what is there already, by its
        sha256, is not sent again. Called with the package's files before the first `run`."""

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        """Run one job in a fresh process; returns the content of its out.json; logits.bin comes to `scratch`.

        Raises DeviceLost if the connection broke (the same job may be tried again), DeviceError otherwise.
        """

    def stop(self) -> None:
        """End what is running: `run`, in another thread, raises. May be called at any time, more than once."""

    def clean_up(self) -> None:
        """Leave nothing behind: processes, files, forwarded ports. May be called more than once; raises DeviceError
        if it knows that something stayed."""


class DeviceError(EdgeftError):
    """A device cannot do what was asked."""


class DeviceLost(DeviceError):
    """The connection to a device broke."""


DEVICES = {  # scheme of a target -> function(address after the ':', or '') that connects and returns its device
    "local": "edgeft.bench.devices.local:open_local",
    "ssh": "edgeft.bench.devices.ssh:open_ssh",
    "android": "edgeft.bench.devices.android:open_android",
    "browser": "edgeft.bench.devices.browser:open_browser",
    "arm64": "edgeft.bench.devices.arm64:open_arm64",
}


@contextmanager
def opened(target: str) -> Iterator[Device]:
    """The device that `target` names ('local', 'ssh:user@host', 'android:SERIAL', 'browser', 'arm64'), cleaned up at
    the end whatever happens.

    Raises DeviceError if there is no such kind or it cannot be reached.
    """
    scheme, _, address = target.partition(":")
    if scheme not in DEVICES:
        raise DeviceError(f"no target is called {target!r}", f"known are {', '.join(DEVICES)}; ssh:USER@HOST")
    module, _, function = DEVICES[scheme].partition(":")
    device: Device = getattr(import_module(module), function)(address)
    with cleaned_up_after_errors(device):
        yield device
    device.clean_up()


@contextmanager
def cleaned_up_after_errors(device: Device) -> Iterator[None]:
    """After any error nothing is left on the device; that the connection broke is not hidden by what could not be
    removed, whose words are added."""
    try:
        yield
    except DeviceLost as lost:
        try:
            device.clean_up()
        except DeviceError as left:
            raise DeviceLost(lost.message, f"{lost.hint}\n     {left.message}; {left.hint}") from lost
        raise
    except BaseException:
        device.clean_up()
        raise
