"""torch and onnxruntime-genai, which compute one row at a time, and what they say beside the other runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.runtimes import runtimes_of
from edgeft.bench.session import Session, open_session
from edgeft.errors import ArtifactError, ModelError
from edgeft.formats.gguf import write_gguf
from tests.bench import session_checks as checks
from tests.formats.tiny_model import tiny_onnx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory)[1]


@pytest.fixture(params=["torch", "genai"])
def session(request: pytest.FixtureRequest, model: Path, package: Path) -> Iterator[Session]:
    folder = model if request.param == "torch" else package
    session = open_session(folder, 1, checks.CONTEXT, runtime=request.param)
    yield session
    session.close()


def test_it_predicts_like_torch_and_forgets_on_reset(session: Session, model: Path) -> None:
    checks.predicts_like_torch(session, model)
    checks.forgets_on_reset(session)


def test_rows_are_scored_and_replayed_as_if_alone(session: Session) -> None:
    checks.scores_rows_of_a_batch_as_if_alone(session)
    checks.replays_what_it_scores(session, number=3)
    checks.scores_rows_without_positions_as_empty(session)


def test_answers_are_those_of_greedy_decoding(session: Session) -> None:
    checks.generates_nothing_when_nothing_is_asked(session)
    checks.generates_what_greedy_decoding_gives(session, number=4)


def test_of_a_draft_is_kept_what_the_model_would_have_said(session: Session) -> None:
    checks.keeps_of_a_draft_what_it_would_have_said(session)


def test_an_answer_ends_where_the_context_is_full(session: Session) -> None:
    checks.ends_an_answer_where_the_context_is_full(session)


def test_prompts_and_answers_have_the_ids_of_the_model(session: Session, model: Path) -> None:
    checks.keeps_the_prompt_contract(session, model)


def test_genai_predicts_what_plain_onnxruntime_predicts_with_the_same_package(package: Path) -> None:
    _agree(*(open_session(package, 1, checks.CONTEXT, runtime=name) for name in ("genai", "onnxruntime")))


def test_torch_predicts_what_its_f32_gguf_predicts(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf", "f32")
    _agree(
        open_session(model, 1, checks.CONTEXT),
        LlamaCppSession(tmp_path / "model.gguf", 1, checks.CONTEXT, kv="f32"),
    )


def _agree(one: Session, other: Session) -> None:
    """Prefilled, stepped and scored; and the answers."""
    [ids] = checks.prompts(one, 1)
    np.testing.assert_allclose(one.prefill(ids[:9]), other.prefill(ids[:9]), atol=checks.TOLERANCE)
    for token in ids[9:]:
        np.testing.assert_allclose(one.step(token), other.step(token), atol=checks.TOLERANCE)
    given = [(row, range(3, len(row), 2)) for row in checks.prompts(one, 3)]
    for a, b in zip(one.score(given), other.score(given), strict=True):
        np.testing.assert_allclose(a, b, atol=checks.TOLERANCE)
    assert one.generate([ids], 12) == other.generate([ids], 12)
    assert one.text_ids("Grüße 12") == other.text_ids("Grüße 12")
    one.close()
    other.close()


def test_a_folder_says_what_can_run_it(model: Path, package: Path, tmp_path: Path) -> None:
    assert (runtimes_of(model), runtimes_of(package)) == (["torch"], ["onnxruntime", "genai"])
    assert runtimes_of(tmp_path) == []
    with pytest.raises(ArtifactError, match="torch cannot run") as caught:
        open_session(package, 1, runtime="torch")
    assert "onnxruntime or genai" in caught.value.hint
    with pytest.raises(ArtifactError, match="no runtime is called 'jax'"):
        open_session(package, 1, runtime="jax")


def test_a_graph_that_genai_cannot_load_is_named(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    settings["model"]["decoder"]["filename"] = "missing.onnx"
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="onnxruntime-genai cannot load"):
        open_session(tmp_path, threads=1, runtime="genai")
