"""The floor that needs no language model: TF-IDF of words and letters, and a linear SVM that names the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from sklearn.svm import LinearSVC

from edgeft.bench.stats import bootstrap_macro_f1, wilson
from edgeft.bench.task import Task

Row = dict[str, Any]


def evaluate(train: Sequence[Row], test: Sequence[Row], task: Task) -> tuple[list[Row], dict[str, Any], dict[str, str]]:
    """Fit on `train`, score on `test`: per-row results, figures, and the reasons of absent figures."""
    train = [row for row in train if task.gold_label(row) is not None]
    test_at = [i for i, row in enumerate(test) if task.gold_label(row) is not None]
    fields = ("n", "n_json", "intent_accuracy", "intent_macro_f1")
    if not test_at or not train:
        return [], {}, dict.fromkeys(fields, task.why_no_gold())
    labels = [str(task.gold_label(row)) for row in train]
    if len(set(labels)) < 2:
        return [], {}, dict.fromkeys(fields, "all training rows have the same label")
    model = _model().fit([user_text(row) for row in train], labels)
    gold = [str(task.gold_label(test[i])) for i in test_at]
    predicted = [str(label) for label in model.predict([user_text(test[i]) for i in test_at])]
    correct = [g == p for g, p in zip(gold, predicted, strict=True)]
    results = [
        {"index": i, "id": test[i].get("id") or test[i].get("meta", {}).get("id"), "intent_correct": hit,
         "slices": {"label": label}}
        for i, hit, label in zip(test_at, correct, gold, strict=True)
    ]  # fmt: skip
    figures = {
        "n": len(test),
        "n_json": len(test_at),
        "intent_accuracy": wilson(sum(correct), len(correct)),
        "intent_macro_f1": bootstrap_macro_f1(gold, predicted),
    }
    return results, figures, {}


def user_text(row: Row) -> str:
    """Everything the user says in a conversation."""
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")


def _model() -> Pipeline:
    return make_pipeline(
        make_union(
            TfidfVectorizer(analyzer="word", ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        ),
        LinearSVC(random_state=0),
    )
