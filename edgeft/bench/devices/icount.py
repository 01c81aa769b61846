"""Instructions that a model takes on an emulated processor: a figure that is the same on any machine, unlike a time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeft.bench.devices.job import Job, RowJob, SpeedJob

SOURCE = Path(__file__).with_name("icount.c")
APIS = range(1, 8)  # versions of QEMU's plugin interface; each QEMU takes some
STEPS = 4  # decode steps whose instructions are counted
COUNT = "instructions.txt"

Starts = Callable[[Sequence[str]], bool]  # whether the runner starts with these options of QEMU
Run = Callable[[Sequence[str], Job], dict[str, Any]]  # runs a job with these options of QEMU


def count_instructions(speed: SpeedJob, folder: Path, starts: Starts, run: Run) -> dict[str, Any]:
    """{"decode_per_token": instructions of one decode step after the job's prompt} or null with the reason in "absent".

    Counted on one thread, as the difference of two runs that decode 1 and `STEPS` + 1 tokens.
    """
    plugin, reason = _plugin(folder, starts)
    if not plugin:
        return {"decode_per_token": None, "absent": reason}
    counts = []
    for tokens in (1, STEPS + 1):
        context = len(speed.prompt) + STEPS + 1
        run(plugin, Job(1, context, max_new_tokens=tokens, rows=[RowJob(speed.prompt)]))
        counts.append(int((folder / COUNT).read_text("ascii")))
    return {"decode_per_token": (counts[1] - counts[0]) / STEPS, "steps": STEPS, "absent": None}


def _plugin(folder: Path, starts: Starts) -> tuple[list[str], str]:
    """Options with which this QEMU counts, or none and the reason."""
    compiler = shutil.which("cc")
    if not compiler:
        return [], "there is no C compiler to build the plugin that counts"
    library = folder / "libicount.so"
    for version in APIS:
        command = [compiler, "-shared", "-fPIC", "-O2", f"-DPLUGIN_API={version}", str(SOURCE), "-o", str(library)]
        built = subprocess.run(command, capture_output=True)
        if built.returncode != 0:
            return [], "the plugin that counts cannot be compiled here"
        options = ["-plugin", f"{library},out={folder / COUNT}"]
        if starts(options):
            return options, ""
    return [], "this QEMU takes no plugins (qemu-user does, qemu-user-static does not)"
