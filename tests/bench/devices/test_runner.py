"""The native runner against the session that runs the same file here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.bench.devices.child import ignore
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.job import LOGITS, OUT, ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.local import LocalDevice
from edgeft.bench.devices.native import NATIVE, Level
from edgeft.bench.devices.shell import run_job
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.gguf import write_gguf
from tests.bench import session_checks as checks
from tests.bench.devices.built import built_runner, run
from tests.formats.tiny_model import write_tiny_llama

TOLERANCE = 0.03  # of logits around 3, where rows share a batch: the cache and attention are half precision


@pytest.fixture(scope="module")
def runner() -> Path:
    return built_runner(NATIVE, Level(NATIVE))


@pytest.fixture(scope="module")
def model(runner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.gguf"
    write_gguf(write_tiny_llama(tmp_path_factory.mktemp("model"), seed=3), path, "f32")
    return path


@pytest.fixture
def session(model: Path) -> Iterator[LlamaCppSession]:
    session = LlamaCppSession(model, 1, checks.CONTEXT)
    yield session
    session.close()


def test_a_row_alone_is_answered_and_scored_to_the_bit_as_in_the_session(
    runner: Path, model: Path, session: LlamaCppSession, tmp_path: Path
) -> None:
    for ids in checks.prompts(session, 3):
        forced = ForcedJob(ids, [3, 9, len(ids) - 1])
        stops = sorted(session.stop_ids)
        code, out = run(runner, model, Job(1, checks.CONTEXT, stops, 9, rows=[RowJob(ids)]), tmp_path)
        assert code == 0 and out["answers"] == [checks.greedy(session, ids, 9)] and len(out["answers"][0]) > 3
        code, out = run(runner, model, Job(1, checks.CONTEXT, forced=[forced], logits=LOGITS), tmp_path)
        [expected] = session.score([(ids, forced.positions)])
        raw = np.fromfile(tmp_path / LOGITS, np.float32).reshape(expected.shape)
        np.testing.assert_allclose(raw, expected, atol=1e-6)
        [found] = out["forced"]
        assert found["argmax"] == expected.argmax(axis=1).tolist()
        logs = log_softmax(expected)
        np.testing.assert_allclose(found["next_logprob"][:2], logs[[0, 1], [ids[4], ids[10]]], atol=1e-6)
        np.testing.assert_allclose(found["top_logprob"], logs.max(axis=1), atol=1e-6)
        assert found["next_logprob"][2] is None, "no token follows the last"


def test_rows_together_are_answered_and_scored_as_in_the_session(
    runner: Path, model: Path, session: LlamaCppSession, tmp_path: Path
) -> None:
    prompts = checks.prompts(session, 12)
    likely = [token for ids in prompts[:3] for token in checks.greedy(session, ids, 12)]
    session.stop_ids = session.stop_ids | {likely[5], likely[-1]}
    stop = min(session.stop_ids)
    answers = session.generate(prompts, 12)
    assert len({len(answer) for answer in answers}) > 2, "the test needs answers of different length"
    drafts: list[list[int]] = []
    for i, answer in enumerate(answers):  # right, half right, wrong, too long, empty
        drafts.append([[*answer, stop], [*answer[:4], 7, 7, stop], [9, stop], [*answer, 5, 6], []][i % 5])
    rows = [RowJob(ids, draft) for ids, draft in zip(prompts, drafts, strict=True)]
    job = Job(1, checks.CONTEXT, sorted(session.stop_ids), 12, rows=rows)
    code, out = run(runner, model, job, tmp_path)
    assert code == 0 and len(out["answers"]) == len(rows)
    assert sum(found == answer for found, answer in zip(out["answers"], answers, strict=True)) >= 10
    wanted = [([*p, *d], range(len(p) - 1, len(p) + len(d) - 1)) for p, d in zip(prompts, drafts, strict=True)]
    for scored, draft, found in zip(session.score(wanted), drafts, out["references"], strict=True):
        logs = log_softmax(scored)
        np.testing.assert_allclose(found["next_logprob"], logs[range(len(draft)), draft], atol=TOLERANCE)
        np.testing.assert_allclose(found["top_logprob"], logs.max(axis=1, initial=-99), atol=TOLERANCE)


def log_softmax(logits_PV: NDArray[np.float32]) -> NDArray[np.float64]:
    wide_PV = logits_PV.astype(np.float64)
    logs: NDArray[np.float64] = wide_PV - np.log(np.exp(wide_PV).sum(axis=1, keepdims=True))
    return logs


def test_it_times_every_step_and_says_in_which_state(runner: Path, model: Path, tmp_path: Path) -> None:
    code, out = run(runner, model, Job(1, 64, speed=SpeedJob([5] * 40, 7, 3), cpus=[0]), tmp_path)
    assert code == 0 and out["answers"] == out["forced"] == []
    assert [len(sample["decode_s"]) for sample in out["samples"]] == [7] * 3 == [len(out["trace"]) + 4] * 3
    assert all(sample["prefill_s"] > 0 and sample["prompt_tokens"] == 40 for sample in out["samples"])
    assert 1 <= out["warm_ups"] <= 6 and out["peak_rss_bytes"] > 1e6 and out["load_s"] > 0
    assert out["before"]["wall_s"] < out["after"]["wall_s"] and out["before"]["own_s"] < out["after"]["own_s"]
    assert out["after"]["busy_s"] > 0 and len(out["after"]["load_average"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": [{"prompt": [5, 99999]}]}, "99999"),
        ({"rows": [{"prompt": [5] * 200}]}, "200 tokens"),
        ({"rows": [{"prompt": []}]}, "no prompt"),
        ({"forced": [{"ids": [5, 6], "positions": [1, 0]}]}, "positions"),
        ({"cpus": [999]}, "999"),
        ({"runner": 99}, "version 1"),
        ({"threads": 0}, "0 threads"),
        ({"stop_ids": "no list"}, "no job"),
    ],
)
def test_a_wrong_job_is_refused_in_words(change: dict, words: str, runner: Path, model: Path, tmp_path: Path) -> None:
    job = json.loads(Job(1, 64, rows=[RowJob([5])]).text()) | change
    code, out = run(runner, model, json.dumps(job), tmp_path)
    assert code == 2 and words in out["error"]["message"]


def test_a_damaged_file_is_named(runner: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(model.read_bytes()[:2000])
    code, out = run(runner, tmp_path / "broken.gguf", Job(1, 64, rows=[RowJob([5])]), tmp_path)
    assert code == 2 and "broken.gguf" in out["error"]["message"] and out["error"]["hint"]


@pytest.mark.parametrize("name", [LOGITS, OUT])
def test_a_disk_that_fills_up_under_the_results_is_said(name: str, runner: Path, model: Path, tmp_path: Path) -> None:
    job = Job(1, 64, forced=[ForcedJob([5, 6, 7], [0, 1, 2])], logits=LOGITS)
    device = LocalDevice()
    try:
        Path(device.folder, f"{name}.partial").symlink_to("/dev/full")  # takes nothing, as a full disk does
        with pytest.raises(DeviceError, match=f"cannot write {name}: No space left on device") as caught:
            run_job(device, [str(runner), str(model)], job, tmp_path, ignore)
    finally:
        device.clean_up()
    assert "free space" in caught.value.hint and not (tmp_path / name).exists()
