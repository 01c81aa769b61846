"""The emulated ARM processor against this one, on the real small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from edgeft.bench.devices import arm64
from edgeft.bench.devices.arm64 import Arm64Device, open_arm64
from edgeft.bench.devices.device import DeviceError, opened
from edgeft.bench.devices.job import LOGITS, OUT, ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.native import LEVELS, Level
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.gguf import write_gguf
from edgeft.formats.parity import compare
from tests.bench.devices.built import built_runner
from tests.formats.tiny_model import write_tiny_llama
from tests.real_model import smollm2_gguf

QUESTION = [{"role": "user", "content": "My parcel 4711 has not arrived. Where is it?"}]
WEIGHTS = 134_515_008  # of SmolLM2-135M
REPLY = "I am sorry about that. Let me look up parcel 4711 and tell you what can be done."


def level_called(name: str) -> Level:
    """A level whose runner is built; skips the test without it or QEMU."""
    level = next(level for level in LEVELS["aarch64"] if level.name == name)
    built_runner("aarch64", level)
    if not any(map(arm64.shutil.which, arm64.QEMU)):
        pytest.skip("needs QEMU's user emulation (Debian: qemu-user)")
    return level


def test_without_qemu_or_with_an_unknown_level_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"armv7.*\n.*armv9, armv8.2, armv8.0"):
        open_arm64("armv7")
    monkeypatch.setattr(arm64.shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="apt install qemu-user"):
        open_arm64("")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "has", "lacks"),
    [
        ("armv9", {"dotprod", "i8mm"}, set()),
        ("armv8.2", {"dotprod"}, {"i8mm"}),
        ("armv8.0", set(), {"dotprod", "i8mm"}),
    ],
)
def test_it_predicts_what_this_machine_predicts(tmp_path: Path, level: str, has: set[str], lacks: set[str]) -> None:
    level_called(level)
    model = smollm2_gguf()
    session = LlamaCppSession(model, 2, 256)
    prompt, answer = session.prompt_ids(QUESTION), session.answer_ids(REPLY)
    ids, at = [*prompt, *answer], list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    answering = Job(2, 256, sorted(session.stop_ids), 8, rows=[RowJob(prompt, answer)])
    forcing = Job(2, 256, forced=[ForcedJob(ids, at)], logits=LOGITS)
    with opened(f"arm64:{level}") as device:
        device.push({"model.gguf": model})
        # apart: in one job the second would find the first one's prompt in the cache, and round in other batches
        answered, out = (device.run(job, tmp_path, lambda line: None) for job in (answering, forcing))
        facts = device.probe()
    assert device.emulated and facts["ram_bytes"] is None and facts["absent"]["ram_bytes"] == "emulated"
    assert has <= set(out["cpu_features"]) and not lacks & set(out["cpu_features"]) and out["samples"] == []
    [own] = session.score([(ids, at)])
    theirs = np.fromfile(tmp_path / LOGITS, np.float32).reshape(own.shape)
    agreement = compare(own, theirs, np.array(answer, np.int32))
    assert agreement.kl_mean < 0.02 and agreement.top1 > 0.8
    # Of 25 positions three have two tokens that are nearly as likely: another order of summing may swap these alone.
    best, chosen = own.argmax(axis=1), theirs.argmax(axis=1)
    chances = softmax(own, axis=1)
    lead = chances[np.arange(len(own)), best] - chances[np.arange(len(own)), chosen]
    assert lead.max() < 0.1
    [reference], [forced] = answered["references"], out["forced"]
    np.testing.assert_allclose(reference["next_logprob"], forced["next_logprob"], atol=1e-6)
    assert not Path(device.folder).exists()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_timed_job_is_counted_instead_and_the_count_is_repeatable(tmp_path: Path) -> None:
    level_called("armv8.2")
    job = Job(1, 64, speed=SpeedJob([5, 6, 7, 8], 16, 5))
    with opened("arm64") as device:
        device.push({"model.gguf": smollm2_gguf()})
        first, second = (device.run(job, tmp_path, lambda line: None) for _ in range(2))
    assert first["samples"] == [] and first["absent"] == {"samples": "emulated"} and first["peak_rss_bytes"] is None
    count = first["instructions"]["decode_per_token"]
    if count is None:
        pytest.skip(first["instructions"]["absent"])
    assert WEIGHTS / 16 < count < WEIGHTS  # an instruction multiplies 16 of them, which others unpack first
    assert second["instructions"]["decode_per_token"] == pytest.approx(count, rel=1e-3)


@pytest.mark.slow
def test_a_build_for_a_newer_processor_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arm64.CPUS, "armv8.2", "cortex-a72")
    level_called("armv8.2")
    with pytest.raises(DeviceError, match=r"SIGILL(.|\n)*older level"):
        open_arm64("armv8.2")


@pytest.mark.slow
def test_a_stopped_job_raises_and_leaves_nothing(tmp_path: Path) -> None:
    level = level_called("armv8.2")
    write_gguf(write_tiny_llama(tmp_path / "model"), tmp_path / "model.gguf", "f32")
    device = open_arm64("")
    assert isinstance(device, Arm64Device) and device.level == level
    device.push({"model.gguf": tmp_path / "model.gguf"})
    rows = [RowJob([5, 6, 7])] * 5000

    def stop(line: str) -> None:
        if json.loads(line)["done"] > 3:
            device.stop()

    with pytest.raises(DeviceError, match="stopped"):
        device.run(Job(1, 64, max_new_tokens=20, rows=rows), tmp_path, stop)
    device.clean_up()
    device.clean_up()
    assert not Path(device.folder).exists() and not (tmp_path / OUT).exists()
