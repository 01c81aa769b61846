"""Emulated 64-bit ARM: the static runner under QEMU's user emulation, for correctness and instruction counts.

It says what the kernels of a phone's processor compute, and never how fast: a timed job is counted instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft.bench.devices.child import Children, ignore
from edgeft.bench.devices.device import HERE, DeviceError, OnLine
from edgeft.bench.devices.facts import make_facts
from edgeft.bench.devices.icount import count_instructions
from edgeft.bench.devices.job import Job, SpeedJob
from edgeft.bench.devices.native import Level, level_called, runner_of
from edgeft.bench.devices.private import private_folder
from edgeft.bench.devices.shell import MODEL_NAME, RUNNER_NAME, Exit, check_runner, run_job
from edgeft.bench.host import physical_cores

MACHINE = "aarch64"
QEMU = ("qemu-aarch64", "qemu-aarch64-static")  # the second knows no plugins
# A processor that QEMU emulates with what the level may use and nothing above it: the wrong build dies there too.
CPUS = {"armv9": "max", "armv8.2": "cortex-a76", "armv8.0": "cortex-a72"}
DEFAULT = "armv8.2"  # most phones in use
EMULATED = "emulated"


def open_arm64(address: str) -> Arm64Device:
    """An emulated processor of one level ('armv9', 'armv8.2', 'armv8.0'; '': armv8.2), its runner tried.

    Raises DeviceError if QEMU or the runner is missing.
    """
    level = level_called(MACHINE, address or DEFAULT)
    qemu = next((found for name in QEMU if (found := shutil.which(name))), None)
    if not qemu:
        raise DeviceError("QEMU's user emulation was not found", "apt install qemu-user")
    device = Arm64Device(qemu, level, runner_of(MACHINE, level), f"arm64:{address}" if address else "arm64")
    try:
        check_runner(device, device.argv[:2])
    except BaseException:
        device.clean_up()
        raise
    return device


class Arm64Device:
    """`Device` and `Shell` of one emulated processor; its folder lies on this machine."""

    kind = "arm64"
    emulated = True
    place = HERE
    formats = frozenset({"gguf"})

    def __init__(self, qemu: str, level: Level, runner: Path, name: str = "arm64") -> None:
        self.name, self.level = name, level
        self.folder = private_folder()
        self.argv = (qemu, f"./{RUNNER_NAME}", MODEL_NAME)
        self._children = Children(name)
        self._environment = {**os.environ, "QEMU_CPU": CPUS[level.name]}
        self.push({RUNNER_NAME: runner})

    def probe(self) -> dict[str, Any]:
        lines: list[str] = []
        self._children.run([self.argv[0], "--version"], lines.append)
        values = {
            "cpu": f"{CPUS[self.level.name]}, emulated",
            "machine": MACHINE,
            "cores_physical": physical_cores(),  # each thread of the program is one of this machine's
            "disk_free_bytes": shutil.disk_usage(self.folder).free,
            "cpu_features": list(self.level.needs),
            "os": f"Linux programs under {lines[0]}" if lines else None,
        }
        return make_facts(values, {}, EMULATED)

    def call(self, argv: Sequence[str], on_line: OnLine = ignore) -> Exit:
        return self._children.run(argv, on_line, cwd=Path(self.folder), environment=self._environment)

    def push(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            link = Path(self.folder) / name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())

    def pull(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            if (Path(self.folder) / name).is_file():
                shutil.move(Path(self.folder) / name, folder / name)

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        """As `Device.run`, but for speed: "samples" is empty, "absent" says why, and "instructions" has the counts."""
        out = run_job(self, self.argv, replace(job, speed=None), scratch, on_line)
        if job.speed:
            out |= {"samples": [], "absent": {"samples": EMULATED}, "peak_rss_bytes": None}
            out["instructions"] = self._count(job.speed, scratch, on_line)
        return out

    def stop(self) -> None:
        self._children.stop()

    def clean_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _count(self, speed: SpeedJob, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        qemu, *program = self.argv

        def run(plugin: Sequence[str], job: Job) -> dict[str, Any]:
            return run_job(self, [qemu, *plugin, *program], job, scratch, on_line)

        def starts(plugin: Sequence[str]) -> bool:
            return self.call([qemu, *plugin, program[0], "--version"]).code == 0

        return count_instructions(speed, Path(self.folder), starts, run)
