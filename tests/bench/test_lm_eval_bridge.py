"""lm-evaluation-harness's own calls, answered by a package and by the harness's torch model: the same answers.

Needs the harness: installed by the extra `lm-eval`, or beside the environment by `make bench-speed`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeft.errors import DataError
from tests.formats.tiny_model import tiny_onnx

beside = Path(os.environ.get("EDGEFT_LM_EVAL", Path(sys.prefix) / "peers-lm-eval"))
if beside.is_dir():
    sys.path.append(str(beside))
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import edgeft.bench.lm_eval_bridge  # noqa: E402, F401 - registers the model

TEXT = "Where is my order 12345? Grüße aus Köln!"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A package as the harness makes it from a command line, and its model in the harness's own backend."""
    model, package = tiny_onnx(tmp_path_factory)
    ours = get_model("edgeft").create_from_arg_string(f"package={package},threads=1,max_length=40", {"batch_size": 1})
    return ours, HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1, max_length=40)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def test_continuations_are_as_likely_and_as_greedy_as_in_torch(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    pairs = [("", TEXT), (TEXT, " I'd like a refund"), ("Cancel ", "the order"), (TEXT * 3, " lamps")]
    begun = [TEXT[:end] for end in range(8, 24)]
    next_token = [(text, {"until": [], "max_gen_toks": 1}) for text in begun]
    said = zip(begun, theirs.generate_until(asked("generate_until", *next_token)), strict=True)
    pairs += [(a, b) for a, b in said if len(theirs.tok_encode(a + b)) > len(theirs.tok_encode(a))]
    found, expected = (side.loglikelihood(asked("loglikelihood", *pairs)) for side in models)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=2e-3)
    assert [one for _, one in found] == [one for _, one in expected]
    assert {one for _, one in found} == {True, False}
    assert ours.loglikelihood([]) == []


def test_whole_texts_are_as_likely_as_in_torch_also_when_they_are_longer_than_the_context(
    models: tuple[Any, Any],
) -> None:
    texts = [(TEXT,), (TEXT * 5,)]
    found, expected = (side.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for side in models)
    assert found == pytest.approx(expected, abs=5e-3)


def test_answers_end_where_torchs_do(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    [long] = theirs.generate_until(asked("generate_until", (TEXT[:8], {"until": [], "max_gen_toks": 20})))
    requests = [(TEXT[:8], {"until": [long[4:6]], "max_gen_toks": 20}), (TEXT[:8], {"until": [], "max_gen_toks": 3})]
    found, expected = (side.generate_until(asked("generate_until", *requests)) for side in models)
    assert found == expected and len(found[0]) <= 4
    with pytest.raises(DataError, match="sampled"):
        ours.generate_until(asked("generate_until", (TEXT, {"do_sample": True})))


def test_conversations_are_written_by_the_packages_template(models: tuple[Any, Any]) -> None:
    turns = [{"role": "user", "content": "hi"}]
    assert models[0].apply_chat_template(turns) == models[1].apply_chat_template(turns)
