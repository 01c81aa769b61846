from __future__ import annotations

import json
from typing import Any

from edgeft.bench.svm import evaluate, user_text
from edgeft.bench.task import Task

TASK = Task("intent", "entities")


def row(user: str, label: str) -> dict[str, Any]:
    content = json.dumps({"intent": label, "entities": {}})
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": content}]}


TRAIN = [row(f"where is my {x}", "track") for x in ("order", "parcel", "box")] + [
    row(f"please cancel the {x}", "cancel") for x in ("order", "parcel", "box")
]


def test_it_learns_from_the_words_of_the_user() -> None:
    test = [row("where is the lamp", "track"), row("cancel my lamp", "cancel"), row("cancel the lamp", "track")]
    results, figures, absent = evaluate(TRAIN, test, TASK)
    assert [r["intent_correct"] for r in results] == [True, True, False]
    assert figures["intent_accuracy"][0] == 2 / 3
    assert figures["n"] == 3
    assert absent == {}


def test_the_answer_is_never_an_input() -> None:
    assert user_text(row("hello", "track")) == "hello"


def test_rows_without_a_label_leave_the_figures_out_with_a_reason() -> None:
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    results, figures, absent = evaluate([plain], [plain], TASK)
    assert (results, figures) == ([], {})
    assert "'intent'" in absent["intent_accuracy"]


def test_one_label_is_nothing_to_learn() -> None:
    _, figures, absent = evaluate(TRAIN[:3], TRAIN, TASK)
    assert figures == {}
    assert "same label" in absent["intent_accuracy"]
