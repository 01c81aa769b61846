from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeft.bench import ort
from edgeft.bench.ort import OrtSession
from edgeft.bench.ort_growing import GrowingSession
from edgeft.bench.session import open_session
from edgeft.errors import ArtifactError, ModelError
from tests.bench import session_checks as checks
from tests.formats.tiny_model import tiny_onnx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory)[1]


@pytest.fixture
def session(package: Path) -> Iterator[OrtSession]:
    session = OrtSession(package / "model.onnx", 1, checks.CONTEXT)
    yield session
    session.close()


def test_it_predicts_like_torch_prefilled_stepped_and_scored(session: OrtSession, model: Path) -> None:
    checks.predicts_like_torch(session, model)


def test_it_forgets_on_reset(session: OrtSession) -> None:
    checks.forgets_on_reset(session)


def test_rows_scored_together_do_not_see_one_another(session: OrtSession) -> None:
    checks.scores_rows_of_a_batch_as_if_alone(session)


def test_rows_replayed_token_by_token_give_what_scoring_gives(session: OrtSession) -> None:
    checks.replays_what_it_scores(session, number=ort.SLOTS + 3)


def test_goes_on_with_an_answer_that_scoring_has_begun(session: OrtSession) -> None:
    checks.goes_on_with_an_answer_that_scoring_has_begun(session)


def test_of_a_draft_is_kept_what_the_model_would_have_said(session: OrtSession) -> None:
    checks.keeps_of_a_draft_what_it_would_have_said(session)


def test_rows_without_positions_give_no_logits(session: OrtSession) -> None:
    checks.scores_rows_without_positions_as_empty(session)


def test_batched_answers_are_those_of_greedy_decoding(session: OrtSession) -> None:
    checks.generates_what_greedy_decoding_gives(session, number=2 * ort.SLOTS + 3)


def test_long_rows_get_fewer_slots_and_the_same_answers(session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "CACHE_BYTES", 1)
    checks.generates_what_greedy_decoding_gives(session, number=4)


def test_nothing_asked_gives_nothing(session: OrtSession) -> None:
    checks.generates_nothing_when_nothing_is_asked(session)


def test_an_answer_ends_where_the_context_is_full(session: OrtSession) -> None:
    checks.ends_an_answer_where_the_context_is_full(session)


def test_prompts_and_answers_have_the_ids_of_the_model(session: OrtSession, model: Path) -> None:
    checks.keeps_the_prompt_contract(session, model)


def test_rows_of_different_length_are_stepped_together(session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, ...]] = []
    real = session._run

    def note(binding: object, ids_BS: object, lengths_B: object) -> object:
        batches.append(ids_BS.shape)  # type: ignore[attr-defined]
        return real(binding, ids_BS, lengths_B)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "_run", note)
    session.stop_ids = frozenset()
    given = checks.prompts(session, ort.SLOTS)
    session.generate(given, 10)
    (_, prefix), *rest = batches
    assert rest == [(1, len(ids) - prefix) for ids in given] + [(ort.SLOTS, 1)] * 9


def test_a_damaged_graph_is_named(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07nothing")
    with pytest.raises(ModelError, match=r"cannot load .*model\.onnx"):
        open_session(tmp_path, threads=1)


def test_a_package_that_does_not_share_its_cache_runs_row_by_row_with_the_same_logits(
    package: Path, tmp_path: Path
) -> None:
    shutil.copytree(package, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    settings["search"]["past_present_share_buffer"] = False
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    growing, in_place = (open_session(folder, threads=1) for folder in (tmp_path, package))
    assert isinstance(growing, GrowingSession)
    ids = [3, 5, 7, 9]
    np.testing.assert_allclose(growing.prefill(ids), in_place.prefill(ids), atol=1e-5)
    np.testing.assert_allclose(growing.step(4), in_place.step(4), atol=1e-5)
    rows = [([3, 5, 7, 9], [1, 3]), ([3, 5, 8], [2])]
    for found, expected in zip(growing.score(rows), in_place.score(rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_folder_without_a_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.gguf, model\.onnx"):
        open_session(tmp_path, threads=1)
