from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.bench.choices import Question, evaluate, load_choices, log_likelihood, tokenise
from edgeft.errors import DataError

QUESTIONS = [Question("Which?", ("yes", "nope"), 0), Question("And?", ("a", "bb", "ccc"), 1)]


class Scripted:
    """Gives a token of a choice the log-probability that the script holds for its letter; all others share the rest."""

    def __init__(self, chances: dict[str, float]) -> None:
        self.chances = chances

    def score(self, rows: Any) -> Any:
        for ids, at in rows:
            logits = np.full((len(at), 512), -1e9, np.float32)
            for row, i in enumerate(at):
                chance = self.chances.get(chr(ids[i + 1]), 0.5)
                logits[row, ids[i + 1]], logits[row, 0] = math.log(chance), math.log(1 - chance)
            yield logits


def test_a_choice_is_scored_after_the_question_and_answer_sign(fake_session: Any) -> None:
    session = fake_session({})
    rows = tokenise(session, QUESTIONS[0])
    texts = ["".join(map(chr, ids)) for ids, _ in rows]
    assert texts == ["Which?\nAnswer: yes", "Which?\nAnswer: nope"]
    followers = ["".join(chr(ids[i + 1]) for i in at) for ids, at in rows]
    assert followers == [" yes", " nope"]  # the space belongs to the choice, as tokenizers have it


def test_the_likeliest_choice_is_taken_with_and_without_its_length(fake_session: Any) -> None:
    session = fake_session({})
    rows = [row for question in QUESTIONS for row in tokenise(session, question)]
    found = evaluate(Scripted({"b": 0.8, "a": 0.7, "c": 0.9}), QUESTIONS, rows)  # type: ignore[arg-type]
    # Sums: yes 3 letters at 0.5 beats nope; then a 0.7, bb 0.64, ccc 0.73. By length: yes = nope but for the space.
    assert found["n"] == 2 and found["accuracy"][0] == 0.5
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_log_likelihood_is_the_sum_of_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    expected = sum(math.log(np.exp(logits[i])[t] / np.exp(logits[i]).sum()) for i, t in enumerate([4, 0, 6]))
    assert log_likelihood(logits, [4, 0, 6]) == pytest.approx(expected, abs=1e-5)


def test_every_unusable_line_is_named(tmp_path: Path) -> None:
    good = {"query": "q", "choices": ["a", "b"], "gold": 1}
    path = tmp_path / "choices.jsonl"
    lines = [json.dumps(good), "{", json.dumps({**good, "gold": 2}), json.dumps({**good, "choices": ["a"]}), "[]"]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"4 lines(.|\n)*line 2(.|\n)*line 3: gold 2(.|\n)*line 4(.|\n)*line 5"):
        load_choices(path)
    path.write_text(lines[0])
    assert load_choices(path) == [Question("q", ("a", "b"), 1)]
