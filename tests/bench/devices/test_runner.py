"""The native runner against the session that runs the same file here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench.devices.job import LOGITS, ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.native import NATIVE, Level
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.gguf import write_gguf
from tests.bench import session_checks as checks
from tests.bench.devices.built import built_runner, run
from tests.formats.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def runner() -> Path:
    return built_runner(NATIVE, Level(NATIVE))


@pytest.fixture(scope="module")
def model(runner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.gguf"
    # of this seed no two likeliest tokens lie closer than ten times the rounding between batches of other sizes
    write_gguf(write_tiny_llama(tmp_path_factory.mktemp("model"), seed=3), path, "f32")
    return path


@pytest.fixture
def session(model: Path) -> Iterator[LlamaCppSession]:
    session = LlamaCppSession(model, 1, checks.CONTEXT)
    yield session
    session.close()


def test_it_answers_and_scores_as_the_session_does(
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
    forced = [ForcedJob(prompts[0], [3, 9, len(prompts[0]) - 1]), ForcedJob(prompts[1], []), ForcedJob(prompts[2], [0])]
    job = Job(1, checks.CONTEXT, sorted(session.stop_ids), 12, rows=rows, forced=forced, logits=LOGITS)
    code, out = run(runner, model, job, tmp_path)
    assert code == 0 and out["answers"] == answers == session.generate(prompts, 12, drafts)
    _scores_are_those_of(session, prompts, drafts, out)
    raw = np.fromfile(tmp_path / LOGITS, np.float32).reshape(-1, session.vocab_size)
    expected = np.concatenate(list(session.score([(row.ids, row.positions) for row in forced])))
    np.testing.assert_allclose(raw, expected, atol=checks.TOLERANCE)
    assert [len(row["argmax"]) for row in out["forced"]] == [3, 0, 1]
    assert out["forced"][0]["next_logprob"][2] is None and out["forced"][0]["next_logprob"][0] < 0


def _scores_are_those_of(
    session: LlamaCppSession, prompts: list[list[int]], drafts: list[list[int]], out: dict
) -> None:
    wanted = [([*p, *d], range(len(p) - 1, len(p) + len(d) - 1)) for p, d in zip(prompts, drafts, strict=True)]
    for scored, draft, found in zip(session.score(wanted), drafts, out["references"], strict=True):
        logs = scored - np.log(np.exp(scored.astype(np.float64)).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(found["next_logprob"], logs[range(len(draft)), draft], atol=checks.TOLERANCE)
        np.testing.assert_allclose(found["top_logprob"], logs.max(axis=1, initial=-1e9), atol=checks.TOLERANCE)
        assert found["argmax"] == scored.argmax(axis=1).tolist()


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
