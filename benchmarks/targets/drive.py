"""Drive one target with a package, and compare what it computes with this machine's own runtime.

    python -m benchmarks.targets.drive TARGET PACKAGE [TEST.jsonl]

prints one JSON object. Some rows of a test split are asked, or three questions of its own. `kl_vs_local` (nats, mean)
and `top1_vs_local` compare the logits on teacher-forced answers with those of a process on this machine. `parts` lists
the greedy answers that are not the same, with the first token that differs and its `margin`: by how many nats this
machine prefers its own token there. Other processors round otherwise, so that close calls fall to another side.
`right` and `right_here` count the answers whose first line is the one that the row wants.
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
from edgeft.bench.devices.device import Device, DeviceError, opened
from edgeft.bench.devices.job import LOGITS, ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.partial import completed
from edgeft.bench.devices.scan import scan
from edgeft.bench.devices.work import files_of
from edgeft.bench.session import Session, open_session
from edgeft.errors import EdgeftError
from edgeft.formats.parity import compare, part_at
from edgeft.progress import Reporter

QUESTIONS = (
    "My parcel 4711 has not arrived. Where is it, and can I still cancel it?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
ANSWER = "I am sorry about that. Let me look up parcel 4711 and tell you what can still be done about the order."
ROWS, NEW_TOKENS = 4, 64  # of the test split, evenly spread; of an answer. An emulated processor takes minutes for four
KL_LIMIT = 0.02  # nats, under which two kernels' rounding stays (benchmarks/LOG.md); a wrong graph is far above
PROMPT_TOKENS, DECODE_TOKENS, REPEATS = 64, 16, 3
ADBD_PORT, ADB_PORT = 5735, 5793
TIMED = ("load_s", "ttft_s", "decode_tps", "wasm_bytes")
ABSENT = {"kl_vs_local": None, "top1_vs_local": None, "emulated": None}


class Broke(EdgeftError):
    """A target that is here, and failed at what it was asked."""


@dataclass(frozen=True)
class Asked:
    """The same for every target: token ids."""

    prompts: list[list[int]]
    wanted: list[str | None]  # first line of the answer, where it is known
    forced: list[ForcedJob]
    next_ids: NDArray[np.int32]  # what follows the forced positions [P]
    stop_ids: list[int]
    context: int


def ask(package: Path, test: Path | None) -> Asked:
    """What the targets are asked: rows of the split `test` with their own answers, else the questions above."""
    session = open_session(package, 1)
    said = {"role": "assistant", "content": ANSWER}
    cases: list[tuple[Any, str | None]] = [([{"role": "user", "content": text}, said], None) for text in QUESTIONS]
    if test:
        rows = [json.loads(line) for line in test.read_text("utf-8").splitlines()]
        spread = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        cases = [(row["messages"], row.get("meta", {}).get("target_json")) for row in spread]
    prompts = [session.prompt_ids(messages[:-1]) for messages, _ in cases]
    answers = [session.answer_ids(messages[-1]["content"]) for messages, _ in cases]
    stop_ids = sorted(session.stop_ids)
    session.close()
    forced = [
        ForcedJob([*ids, *answer], list(range(len(ids) - 1, len(ids) + len(answer) - 1)))
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    following = [row.ids[at + 1] for row in forced for at in row.positions]
    context = max(max(len(row.ids) for row in forced), max(map(len, prompts)) + NEW_TOKENS)
    return Asked(prompts, [wanted for _, wanted in cases], forced, np.array(following, np.int32), stop_ids, context)


def computed(target: str, package: Path, asked: Asked) -> dict[str, Any]:
    """What a target computes: logits [P, V], greedy answers, and, where timings count, the decode rate."""
    with opened(target) as device, tempfile.TemporaryDirectory(prefix="edgeft-drive-") as scratch:
        device.push(files_of(package))
        facts = device.probe()
        rows = [RowJob(ids) for ids in asked.prompts]
        threads = 1 if device.emulated else facts["cores_physical"] or 1
        job = Job(threads, asked.context, asked.stop_ids, NEW_TOKENS, rows=rows, forced=asked.forced, logits=LOGITS)
        try:
            out = device.run(job, Path(scratch), lambda line: None)
        except EdgeftError as error:
            raise Broke(error.message, error.hint) from error
        flat = np.fromfile(Path(scratch, LOGITS), "<f4")
        found = {"logits_PV": flat.reshape(len(asked.next_ids), -1), "answers": out["answers"], "build": out["build"]}
        found |= {"emulated": device.emulated, "decode_tps": None, "threads": threads}
        if not device.emulated:
            found["decode_tps"] = _time(device, threads, asked, Path(scratch))["decode_tps"]
        return found


def timed(target: str, package: Path, asked: Asked) -> dict[str, Any]:
    """The figures of `TIMED` on a target, on few tokens: a sixth of a core gives about one a second."""
    with opened(target) as device, tempfile.TemporaryDirectory(prefix="edgeft-drive-") as scratch:
        device.push(files_of(package))
        few = SpeedJob(speed.prompt_of_length(asked.prompts[0], PROMPT_TOKENS // 4), DECODE_TOKENS // 4, 2)
        return _time(device, device.probe()["cores_physical"] or 1, asked, Path(scratch), few)


def _time(device: Device, threads: int, asked: Asked, scratch: Path, job: SpeedJob | None = None) -> dict[str, Any]:
    job = job or SpeedJob(speed.prompt_of_length(asked.prompts[0], PROMPT_TOKENS), DECODE_TOKENS, REPEATS)
    context = speed.context_needed(PROMPT_TOKENS, DECODE_TOKENS)
    out = device.run(Job(threads, context, asked.stop_ids, speed=job), scratch, lambda line: None)
    found = {**speed.summarise(out["samples"]), "load_s": out["load_s"]}
    wasm = (out.get("memory") or {}).get("bytes")
    return {**{name: round(found[name], 2) for name in TIMED if name in found}, "wasm_bytes": wasm}


def beside(package: Path, local: dict[str, Any], there: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """One target's entry; it is in order if it computes what this machine does."""
    theirs = there["logits_PV"]
    if np.isnan(theirs).any():  # a browser tells the likeliest tokens alone
        theirs = completed(local["logits_PV"], theirs)
    agreement = compare(local["logits_PV"], theirs, asked.next_ids)
    session = open_session(package, 1)
    right_here, right = (_right(session, side["answers"], asked) for side in (local, there))
    partings = _partings(session, local["answers"], there["answers"], asked)
    session.close()
    ok = agreement.kl_mean < KL_LIMIT
    return {
        "ok": ok,
        **({} if ok else {"reason": f"it computes something else: KL {agreement.kl_mean:.3g}, limit {KL_LIMIT}"}),
        "kl_vs_local": agreement.kl_mean,
        "top1_vs_local": agreement.top1,
        "emulated": there["emulated"],
        "n_positions": agreement.n_positions,
        "n_answers": len(asked.prompts),
        "answers_equal": len(asked.prompts) - len(partings),
        "parts": partings,
        "right": right,
        "right_here": right_here,
        "decode_tps": there["decode_tps"],
        "threads": there["threads"],
        "build": there["build"],
    }


def _partings(session: Session, own: list[list[int]], theirs: list[list[int]], asked: Asked) -> list[dict[str, Any]]:
    """Where answers part, and by how much this machine prefers its own token there; null where one of them ends."""
    found = []
    for row, (mine, other) in enumerate(zip(own, theirs, strict=True)):
        if (at := part_at(mine, other)) is None:
            continue
        margin = None
        if at < min(len(mine), len(other)):
            ids = [*asked.prompts[row], *mine[:at]]
            [logits_PV] = session.score([(ids, [len(ids) - 1])])
            margin = round(float(logits_PV[0, mine[at]] - logits_PV[0, other[at]]), 3)
        found.append({"answer": row, "token": at, "margin": margin})
    return found


def _right(session: Session, answers: list[list[int]], asked: Asked) -> int | None:
    """How many answers begin with the line that the row wants; None where no row says."""
    if not any(asked.wanted):
        return None
    lines = [session.decode(ids).split("\n")[0] for ids in answers]
    return sum(line == wanted for line, wanted in zip(lines, asked.wanted, strict=True))


def drive(target: str, package: Path, test: Path | None, local: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """One target's entry, or why there is none."""
    start = time.monotonic()
    try:
        with made_ready(target) as reached:
            if reached is None:
                return _beside_adbd(package, test)
            entry = beside(package, local, computed(reached, package, asked), asked)
    except EdgeftError as error:
        return {"ok": False, **ABSENT, "broke": isinstance(error, Broke), "reason": str(error)}
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


def _beside_adbd(package: Path, test: Path | None) -> dict[str, Any]:
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
        itself += [str(test)] if test else []
        done = subprocess.run([*before, *itself], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise DeviceError(f"adbd under QEMU: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    qemu = {"emulated": True, "decode_tps": None, "device": "Debian's adbd under QEMU"}
    return {**found, **qemu} if found["kl_vs_local"] is not None else found


def main(target: str, package: Path, test: Path | None = None) -> int:
    asked = ask(package, test)
    local = computed("local", package, asked)
    print(json.dumps(drive(target, package, test, local, asked)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
