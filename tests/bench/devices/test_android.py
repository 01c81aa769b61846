"""The driver of phones against a real adb server and a real adbd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench.devices.job import LOGITS, ForcedJob, Job, RowJob
from edgeft.bench.devices.native import LEVELS
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.gguf import write_gguf
from edgeft.formats.parity import compare
from tests.bench import session_checks as checks
from tests.bench.devices.adbd import command_beside_adbd
from tests.bench.devices.built import built_runner
from tests.formats.tiny_model import write_tiny_llama

PORT, SERVER_PORT = 5733, 5791  # adb looks by itself for phones at 5555 to 5585


@pytest.mark.slow
def test_a_phone_is_measured_and_whatever_happens_nothing_stays_on_it(tmp_path: Path) -> None:
    beside = command_beside_adbd(PORT)
    built_runner("aarch64", next(level for level in LEVELS["aarch64"] if level.name == "armv8.2"))
    write_gguf(write_tiny_llama(tmp_path / "model", seed=3), tmp_path / "model.gguf", "f32")
    session = LlamaCppSession(tmp_path / "model.gguf", 1, checks.CONTEXT)
    prompts = checks.prompts(session, 3)
    forced = [ForcedJob(ids, list(range(len(ids) - 8, len(ids)))) for ids in prompts]
    rows = [RowJob(ids) for ids in prompts]
    job = Job(1, checks.CONTEXT, sorted(session.stop_ids), 3, rows=rows, forced=forced, logits=LOGITS)
    (tmp_path / "asked.json").write_text(job.text())
    environment = {
        **os.environ, "HOME": str(tmp_path), "ANDROID_ADB_SERVER_PORT": str(SERVER_PORT), "TEST_ADBD_PORT": str(PORT)
    }  # fmt: skip
    environment.setdefault("EDGEFT_CACHE", str(Path.home() / ".cache" / "edgeft"))
    scenes = [sys.executable, "-m", "tests.bench.devices.android_scenes"]
    argv = [*beside, *scenes, *(str(tmp_path / name) for name in ("model.gguf", "asked.json", "found.json"))]
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())

    works = found["works"]
    assert works["facts"]["machine"] == "aarch64" and "asimddp" in works["facts"]["cpu_features"]
    assert [cluster["cpus"] for cluster in works["facts"]["clusters"]] == [[0], [1]]
    assert "dotprod" in works["out"]["cpu_features"] and len(works["samples"]) == 2
    assert works["energy"]["joules_per_token"] is None and "gauge" in works["energy"]["absent"]
    answers = zip(works["out"]["answers"], session.generate(prompts, 3), strict=True)
    assert sum(theirs == own for theirs, own in answers) >= 2, "more than one near tie fell to the other side"
    theirs = np.fromfile(tmp_path / "works" / LOGITS, np.float32).reshape(-1, session.vocab_size)
    own = np.concatenate(list(session.score([(row.ids, row.positions) for row in forced])))
    agreement = compare(own, theirs, own.argmax(axis=1).astype(np.int32))
    assert agreement.kl_mean < 1e-3 and agreement.top1 > 0.9
    assert '{"what":"answers","total":3,"done":3}' in works["progress"]
    assert {"edgeft-runner", "model.gguf"} <= set(works["folder"]) and works["left"] == []

    assert found["swept"] == [False, True]
    kind, words, left = found["killed"]
    assert (kind, left) == ("DeviceError", []) and "SIGKILL" in words and "memory" in words
    kind, words, left = found["stopped"]
    assert (kind, left) == ("DeviceError", []) and "stopped" in words
    kind, words, left = found["full"]
    assert (kind, left) == ("DeviceError", []) and "315 MB are to be sent" in words
    assert "2 phones" in found["two"][1] and "android:SERIAL" in found["two"][1]
    kind, words, (clean_kind, clean_words) = found["lost"]
    assert kind == "DeviceLost" and "the connection broke" in words
    assert clean_kind == "DeviceError" and "shell rm -rf /data/local/tmp/edgeft-" in clean_words
    assert "cannot reach 127.0.0.1:1" in found["nobody"][1]
