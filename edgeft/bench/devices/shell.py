"""Devices that take commands (ssh, adb, an emulator): the native runner driven over a shell, exit codes in words."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeft.bench.devices.device import DeviceError, OnLine
from edgeft.bench.devices.job import JOB, LOGITS, OUT, RUNNER, Job

RUNNER_NAME, MODEL_NAME = "edgeft-runner", "model.gguf"
LAST_LINES = 8


@dataclass(frozen=True)
class Exit:
    """How a command ended: its code there (128 + n for signal n), and the end of what it wrote to stderr."""

    code: int
    stderr: str = ""


class Shell(Protocol):
    """A way to run commands in a private folder on a device.

    Every call raises DeviceLost if the connection broke, and DeviceError if the device is full (of a disk or a
    memory), locked, or refuses.
    """

    @property
    def name(self) -> str:
        """The target as it was typed."""

    @property
    def folder(self) -> str:
        """The private folder there; commands start in it."""

    def call(self, argv: Sequence[str], on_line: OnLine) -> Exit:
        """Run one command; the lines of its stdout go to `on_line` as they come."""

    def push(self, files: Mapping[str, Path]) -> None:
        """Bring files into the folder; executable ones stay executable."""

    def pull(self, names: Sequence[str], folder: Path) -> None:
        """Fetch files of the folder that are there; others are passed over."""


def check_runner(shell: Shell, argv: Sequence[str]) -> dict[str, Any]:
    """What the runner started by `argv` says about itself (`--version`).

    Raises DeviceError if it does not run there, or is of another version than this edgeft speaks.
    """
    lines: list[str] = []
    ended = shell.call([*argv, "--version"], lines.append)
    if ended.code != 0:
        raise DeviceError(f"{shell.name}: the runner does not start: {reason(ended)}", hint(ended))
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        version = found["runner"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        said = lines[-1][:80] if lines else "nothing"
        raise DeviceError(
            f"{shell.name}: the runner there does not tell its version, it said: {said}",
            "make it again: edgeft device build-runner",
        ) from error
    if version != RUNNER:
        raise DeviceError(
            f"{shell.name}: the runner there speaks version {version}, this edgeft speaks {RUNNER}",
            "make it again: edgeft device build-runner",
        )
    return found


def run_job(shell: Shell, argv: Sequence[str], job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
    """Run one job there as `argv job.json out.json` and fetch what it wrote; `scratch` is a folder here.

    Raises DeviceError with the runner's own words, or what its exit code means.
    """
    out, logits = scratch / OUT, scratch / LOGITS
    for old in (out, logits):
        old.unlink(missing_ok=True)
    (scratch / JOB).write_text(job.text(), "utf-8")
    shell.call(["rm", "-f", OUT, LOGITS], lambda line: None)
    shell.push({JOB: scratch / JOB})
    ended = shell.call([*argv, JOB, OUT], on_line)
    if ended.code in (0, 2):
        shell.pull([OUT, LOGITS] if job.logits else [OUT], scratch)
    if not out.is_file() or ended.code not in (0, 2):
        raise DeviceError(f"{shell.name}: the runner ended {reason(ended)}", hint(ended))
    result: dict[str, Any] = json.loads(out.read_text("utf-8"))
    if "error" in result:
        raise DeviceError(f"{shell.name}: {result['error']['message']}", result["error"].get("hint", ""))
    if result.get("runner") != RUNNER:
        raise DeviceError(f"{shell.name}: the result is of runner version {result.get('runner')}, expected {RUNNER}")
    return result


def reason(ended: Exit) -> str:
    """'with code 132 (SIGILL): the last lines of stderr'."""
    name = ""
    if ended.code > 128:
        number = ended.code - 128
        name = f" ({signal.Signals(number).name})" if number in {int(s) for s in signal.Signals} else ""
    last = "".join(f"\n  | {line}" for line in ended.stderr.strip().splitlines()[-LAST_LINES:])
    return f"with code {ended.code}{name}{last}"


def hint(ended: Exit) -> str:
    """What to do about an exit code."""
    text = ended.stderr.lower()
    if ended.code == 126 or "exec format error" in text:
        return "the runner is for another processor or the folder forbids programs: build it for what `probe` names"
    if ended.code == 127:
        return "the program is not there: push it again, or install what it names"
    if ended.code == 128 + signal.SIGILL:
        return "the runner uses instructions that this processor lacks: build it for an older level"
    if ended.code == 128 + signal.SIGKILL:
        return "most often a lack of memory: take a smaller type, or end other programs there"
    if "no space left" in text:
        return "the device is full: free space, or name another folder"
    return "look at the lines above; run the same command again to go on where it stopped"
