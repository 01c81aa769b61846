"""This machine as a device: jobs in processes of this Python, in a private folder; the smallest of all drivers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

import edgeft
from edgeft.bench.devices.child import Children
from edgeft.bench.devices.device import HERE, DeviceError, OnLine
from edgeft.bench.devices.facts import FIELDS, make_facts
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.private import private_folder
from edgeft.bench.devices.shell import Exit, run_job
from edgeft.bench.host import host_facts

WORKER = ("-m", "edgeft.bench.devices.worker", ".")


class LocalDevice:
    """`Device` and `Shell` on this machine; files are linked, not copied."""

    name = kind = "local"
    emulated = False
    place = HERE
    formats = frozenset({"gguf", "onnx"})

    def __init__(self) -> None:
        self.folder = private_folder()
        self._children = Children(self.name)

    def probe(self) -> dict[str, Any]:
        host = host_facts()
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        values = {field: value for field, value in host.items() if field in FIELDS}
        values |= {
            "ram_free_bytes": psutil.virtual_memory().available,
            "disk_free_bytes": shutil.disk_usage(self.folder).free,
            "battery": {"percent": battery.percent, "charging": battery.power_plugged} if battery else None,
        }
        return make_facts(values, host["absent"], "not asked of this machine")

    def push(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            there = Path(self.folder, name)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)
            there.symlink_to(path.resolve())

    def pull(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if Path(self.folder, name).is_file():
                shutil.copy(Path(self.folder, name), folder / name)

    def call(self, argv: Sequence[str], on_line: OnLine) -> Exit:
        code = str(Path(edgeft.__file__).parent.parent)  # it starts in another folder
        paths = os.pathsep.join(part for part in (code, os.environ.get("PYTHONPATH", "")) if part)
        environment = {**os.environ, "PYTHONPATH": paths}
        return self._children.run(argv, on_line, cwd=Path(self.folder), environment=environment)

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        return run_job(self, ["env", f"OMP_NUM_THREADS={job.threads}", sys.executable, *WORKER], job, scratch, on_line)

    def stop(self) -> None:
        self._children.stop()

    def clean_up(self) -> None:
        self._children.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_local(address: str) -> LocalDevice:
    """Raises DeviceError for an address: there is one such machine."""
    if address:
        raise DeviceError(f"local:{address} names no machine", "write 'local'")
    return LocalDevice()
