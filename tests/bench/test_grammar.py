from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgeft.bench.accuracy import prepare
from edgeft.bench.grammar import evaluate, grammar_of
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.task import Task
from edgeft.errors import DataError
from edgeft.formats.gguf import write_gguf
from edgeft.text.answer import first_line_json
from tests.formats.tiny_model import write_tiny_llama

TASK = Task("intent", "entities")


def row(label: str, **fields: Any) -> dict[str, Any]:
    answer = json.dumps({"intent": label, "entities": fields}) + "\nOn it."
    return {"messages": [{"role": "user", "content": f"{label}?"}, {"role": "assistant", "content": answer}]}


TRAIN = [row("track", order_id="AF-1"), row('say "hi"\\', amount="2"), row("cancel")]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppSession]:
    folder = tmp_path_factory.mktemp("grammar")
    write_gguf(write_tiny_llama(folder / "model"), folder / "model.gguf", "f32")
    session = LlamaCppSession(folder / "model.gguf", 1, 400, kv="f32")
    yield session
    session.close()


def test_labels_and_names_come_from_the_rows_in_the_order_of_their_keys() -> None:
    text = grammar_of(TRAIN, TASK)
    root, label = text.splitlines()[:2]
    assert root == r'root ::= "{" "\"intent\"" ": " label ", " "\"entities\"" ": " fields "}" reply?'
    assert r'"\"track\""' in label and r'"\"say \\\"hi\\\"\\\\\""' in label
    assert "order_id" in text and "amount" in text


def test_rows_without_such_answers_are_refused() -> None:
    free = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}]}
    with pytest.raises(DataError, match="no reference answer starts with a JSON line"):
        grammar_of([free], TASK)


def test_a_model_that_knows_nothing_still_writes_a_label_and_its_fields(session: LlamaCppSession) -> None:
    """The tiny model is random: free it never gives JSON, held it always begins so."""
    cases = prepare(session, TRAIN, TASK)
    free = [{"json_valid": False, "intent_correct": False, "joint_correct": False}] * 3
    heard: list[int] = []
    found = evaluate(session, session, cases, free, TASK, grammar_of(TRAIN, TASK), 60, lambda: heard.append(1))
    assert found["n"] == len(heard) == 3
    assert found["json_valid"]["free"][0] == 0.0
    chooser, said = session.chooser(grammar_of(TRAIN, TASK)), []
    logits = session.prefill(cases[0].prompt_ids)
    for _ in range(12):
        said.append(chooser.choose(logits))
        logits = session.step(said[-1])
    text = session.decode(said)
    starts = [json.dumps({"intent": label})[:-1] for label in ("track", 'say "hi"\\', "cancel")]
    assert any(text.startswith(start[: len(text)]) for start in starts), text


def test_what_the_grammar_allows_is_left_as_it_is(session: LlamaCppSession) -> None:
    """Every reference answer passes token by token, and ends with a stop token."""
    text = grammar_of(TRAIN, TASK)
    for example in TRAIN:
        chooser = session.chooser(text)
        answer = example["messages"][-1]["content"]
        for token in session.answer_ids(answer):
            logits = np.zeros(session.vocab_size, np.float32)
            logits[token] = 10.0
            assert chooser.choose(logits) == token, answer
        assert first_line_json(answer)
