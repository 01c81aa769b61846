"""Drive one target with a package, and compare what it computes with this machine's own runtime.

    python -m benchmarks.targets.drive TARGET PACKAGE

prints one JSON object. `kl_vs_local` (nats, mean) and `top1_vs_local` compare the logits on teacher-forced answers with
those of a process on this machine; `parts` lists the greedy answers that are not the same, with the first token that
differs: other processors round otherwise, so that close calls fall to another side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.targets.sshd import Sshd
from edgeft.bench import speed
from edgeft.bench.devices import build, native
from edgeft.bench.devices.device import DeviceError, opened
from edgeft.bench.devices.job import LOGITS, ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.partial import completed
from edgeft.bench.devices.scan import scan
from edgeft.bench.devices.work import files_of
from edgeft.bench.session import open_session
from edgeft.errors import EdgeftError
from edgeft.formats.parity import compare, part_at
from edgeft.progress import Reporter

QUESTIONS = (
    "My parcel 4711 has not arrived. Where is it, and can I still cancel it?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
ANSWER = "I am sorry about that. Let me look up parcel 4711 and tell you what can still be done about the order."
NEW_TOKENS = 24
PROMPT_TOKENS, DECODE_TOKENS, REPEATS = 64, 16, 3
ADBD_PORT, ADB_PORT = 5735, 5793
ABSENT = {"kl_vs_local": None, "top1_vs_local": None, "emulated": None}


@dataclass(frozen=True)
class Asked:
    """The same for every target: token ids."""

    prompts: list[list[int]]
    forced: list[ForcedJob]
    next_ids: NDArray[np.int32]  # what follows the forced positions [P]
    stop_ids: list[int]
    context: int


def ask(package: Path) -> Asked:
    session = open_session(package, 1)
    prompts = [session.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    answer = session.answer_ids(ANSWER)
    stop_ids = sorted(session.stop_ids)
    session.close()
    forced = [ForcedJob([*ids, *answer], list(range(len(ids) - 1, len(ids) + len(answer) - 1))) for ids in prompts]
    following = [row.ids[at + 1] for row in forced for at in row.positions]
    context = max(len(row.ids) for row in forced) + NEW_TOKENS
    return Asked(prompts, forced, np.array(following, np.int32), stop_ids, context)


def computed(target: str, package: Path, asked: Asked) -> dict[str, Any]:
    """What a target computes: logits [P, V], greedy answers, and, where timings count, the decode rate."""
    with opened(target) as device, tempfile.TemporaryDirectory(prefix="edgeft-drive-") as scratch:
        device.push(files_of(package))
        facts = device.probe()
        rows = [RowJob(ids) for ids in asked.prompts]
        threads = 1 if device.emulated else facts["cores_physical"] or 1
        job = Job(threads, asked.context, asked.stop_ids, NEW_TOKENS, rows=rows, forced=asked.forced, logits=LOGITS)
        out = device.run(job, Path(scratch), lambda line: None)
        flat = np.fromfile(Path(scratch, LOGITS), "<f4")
        found = {"logits_PV": flat.reshape(len(asked.next_ids), -1), "answers": out["answers"], "build": out["build"]}
        found |= {"emulated": device.emulated, "decode_tps": None, "threads": threads}
        if not device.emulated:
            prompt = speed.prompt_of_length(asked.prompts[0], PROMPT_TOKENS)
            timed = SpeedJob(prompt, DECODE_TOKENS, REPEATS)
            context = speed.context_needed(PROMPT_TOKENS, DECODE_TOKENS)
            samples = device.run(Job(threads, context, asked.stop_ids, speed=timed), Path(scratch), lambda line: None)
            found["decode_tps"] = round(speed.summarise(samples["samples"])["decode_tps"], 2)
        return found


def beside(local: dict[str, Any], there: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """One target's entry."""
    theirs = there["logits_PV"]
    if np.isnan(theirs).any():  # a browser tells the likeliest tokens alone
        theirs = completed(local["logits_PV"], theirs)
    agreement = compare(local["logits_PV"], theirs, asked.next_ids)
    parts = [part_at(a, b) for a, b in zip(local["answers"], there["answers"], strict=True)]
    return {
        "ok": True,
        "kl_vs_local": agreement.kl_mean,
        "top1_vs_local": agreement.top1,
        "emulated": there["emulated"],
        "n_positions": agreement.n_positions,
        "n_answers": len(parts),
        "answers_equal": sum(at is None for at in parts),
        "parts": [{"answer": row, "token": at} for row, at in enumerate(parts) if at is not None],
        "decode_tps": there["decode_tps"],
        "threads": there["threads"],
        "build": there["build"],
    }


def drive(target: str, package: Path, local: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """One target's entry, or why there is none."""
    start = time.monotonic()
    try:
        with made_ready(target) as reached:
            if reached is None:
                return _beside_adbd(package)
            entry = beside(local, computed(reached, package, asked), asked)
    except EdgeftError as error:
        return {"ok": False, **ABSENT, "reason": str(error)}
    return {**entry, "seconds": round(time.monotonic() - start, 1)}


@contextmanager
def made_ready(target: str) -> Iterator[str | None]:
    """The target with what this machine can add: a throw-away sshd, the phone that is plugged in, the runner.

    None for a phone where there is none but Debian's adbd.
    """
    if target == "ssh":
        _build(native.NATIVE, native.Level(native.NATIVE))
        with tempfile.TemporaryDirectory(prefix="edgeft-sshd-") as folder:
            server = Sshd(Path(folder))
            os.environ["EDGEFT_SSH_CONFIG"] = str(server.config)
            try:
                yield server.target()
            finally:
                del os.environ["EDGEFT_SSH_CONFIG"]
                server.close()
        return
    if target in ("android", "arm64"):
        _build("aarch64", native.level_called("aarch64", "armv8.2"))
    if target == "android":
        phones = [name for name, state, _ in scan() if name.startswith("android:") and state == "ready"]
        yield phones[0] if phones else None
        return
    yield target


def _build(target: str, level: native.Level) -> None:
    build.build_runner(target, level, Reporter(f"runner for {target}", stream=sys.stderr))


def _beside_adbd(package: Path) -> dict[str, Any]:
    """A phone's own adbd, under QEMU in a network of its own: this program again, beside it."""
    import pytest

    from tests.bench.devices.adbd import command_beside_adbd

    try:
        sent = sum(path.stat().st_size for path in files_of(package).values())
        before = command_beside_adbd(ADBD_PORT, 2 * sent)
    except pytest.skip.Exception as error:
        raise DeviceError("no phone is plugged in, and there is no adbd here", str(error.msg)) from error
    with tempfile.TemporaryDirectory(prefix="edgeft-adbd-") as home:
        environment = {**os.environ, "HOME": home, "ANDROID_ADB_SERVER_PORT": str(ADB_PORT)}
        environment.setdefault("EDGEFT_CACHE", str(native.cache_folder()))
        itself = [sys.executable, "-m", "benchmarks.targets.drive", f"android:127.0.0.1:{ADBD_PORT}", str(package)]
        done = subprocess.run([*before, *itself], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise DeviceError(f"adbd under QEMU: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    qemu = {"emulated": True, "decode_tps": None, "device": "Debian's adbd under QEMU"} if found["ok"] else {}
    return {**found, **qemu}


def main(target: str, package: Path) -> int:
    asked = ask(package)
    local = computed("local", package, asked)
    print(json.dumps(drive(target, package, local, asked)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
