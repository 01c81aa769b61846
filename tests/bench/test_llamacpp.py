from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest

from edgeft.bench import batched, llamacpp
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.session import open_session
from edgeft.errors import ModelError
from edgeft.formats.gguf import write_gguf
from tests.bench import session_checks as checks
from tests.formats.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def package(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    write_gguf(model, folder / "model.gguf", "f32")
    return folder


@pytest.fixture
def session(package: Path) -> Iterator[LlamaCppSession]:
    session = LlamaCppSession(package / "model.gguf", 1, checks.CONTEXT, kv="f32")
    yield session
    session.close()


def test_it_predicts_like_torch_prefilled_stepped_and_scored(session: LlamaCppSession, model: Path) -> None:
    checks.predicts_like_torch(session, model)


def test_it_forgets_on_reset(session: LlamaCppSession) -> None:
    checks.forgets_on_reset(session)


def test_rows_scored_together_do_not_see_one_another(session: LlamaCppSession) -> None:
    checks.scores_rows_of_a_batch_as_if_alone(session)


def test_a_long_batch_is_split_into_calls(session: LlamaCppSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "CALL_TOKENS", 60)
    checks.scores_rows_of_a_batch_as_if_alone(session)


def test_rows_replayed_token_by_token_give_what_scoring_gives(session: LlamaCppSession) -> None:
    checks.replays_what_it_scores(session, number=llamacpp.SLOTS + 3)


def test_goes_on_with_an_answer_that_scoring_has_begun(session: LlamaCppSession) -> None:
    checks.goes_on_with_an_answer_that_scoring_has_begun(session)


def test_of_a_draft_is_kept_what_the_model_would_have_said(session: LlamaCppSession) -> None:
    checks.keeps_of_a_draft_what_it_would_have_said(session)


def test_rows_without_positions_give_no_logits(session: LlamaCppSession) -> None:
    checks.scores_rows_without_positions_as_empty(session)


def test_batched_answers_are_those_of_greedy_decoding(session: LlamaCppSession) -> None:
    checks.generates_what_greedy_decoding_gives(session, number=2 * llamacpp.SLOTS + 3)


def test_nothing_asked_gives_nothing(session: LlamaCppSession) -> None:
    checks.generates_nothing_when_nothing_is_asked(session)


def test_an_answer_ends_where_the_context_is_full(session: LlamaCppSession) -> None:
    checks.ends_an_answer_where_the_context_is_full(session)


def test_prompts_and_answers_have_the_ids_of_the_model(session: LlamaCppSession, model: Path) -> None:
    checks.keeps_the_prompt_contract(session, model)


def test_sequences_are_decoded_together_and_the_prefix_once(
    session: LlamaCppSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = llama_cpp.llama_decode

    def count(context: object, batch: llama_cpp.llama_batch) -> int:
        sizes.append(batch.n_tokens)
        return int(real(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", count)
    session.stop_ids = frozenset()
    given = checks.prompts(session, llamacpp.SLOTS)
    session.generate(given, 10)
    prefix, prompts, *steps = sizes
    assert prefix > 20 and prompts == sum(len(ids) - prefix for ids in given)
    assert steps == [llamacpp.SLOTS] * 9


def test_the_default_cache_is_half_precision_and_close(package: Path, model: Path) -> None:
    session = open_session(package, threads=1, context=checks.CONTEXT)
    assert isinstance(session, LlamaCppSession)
    checks.forgets_on_reset(session)
    session.close()


def test_a_damaged_file_is_named_with_what_llamacpp_says(package: Path, tmp_path: Path) -> None:
    whole = (package / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.gguf: .*\w{4}"):
        open_session(tmp_path, threads=1)


def test_nothing_is_written_to_the_terminal(session: LlamaCppSession, capfd: pytest.CaptureFixture[str]) -> None:
    session.generate(checks.prompts(session, 2), 3)
    assert capfd.readouterr() == ("", "")
