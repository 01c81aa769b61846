"""Multiple choice by log-likelihood: the model has chosen the answer that it finds the likeliest after the question.

Scored as in lm-evaluation-harness: the sum over a choice's tokens, and the same divided by the choice's length in
characters, which does not favour short ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.bench.session import Logits, Session
from edgeft.bench.stats import wilson
from edgeft.errors import DataError
from edgeft.text.prefix import common_prefix

ASK = "\nAnswer: "
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Question:
    """A question, its possible answers, and which of them is right."""

    query: str
    choices: tuple[str, ...]
    gold: int


def load_choices(path: Path) -> list[Question]:
    """Read {"query", "choices", "gold"} lines. Raises DataError with every line that is something else."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", 'each line is {"query": ..., "choices": [...], "gold": 0}')
    found, problems = [], []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            question = Question(row["query"], tuple(row["choices"]), row["gold"])
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"  line {number}: {type(error).__name__} {error}")
            continue
        texts = [question.query, *question.choices]
        if not all(isinstance(text, str) and text.strip() for text in texts) or len(question.choices) < 2:
            problems.append(f"  line {number}: expected a query and two or more choices, none of them empty")
        elif not isinstance(question.gold, int) or not 0 <= question.gold < len(question.choices):
            problems.append(f"  line {number}: gold {question.gold!r} is no number of a choice (from 0)")
        else:
            found.append(question)
    if problems or not found:
        told = "\n".join(problems[:SHOWN_PROBLEMS]) or "  no line in it"
        raise DataError(f"{path}: {len(problems)} lines cannot be used\n{told}", "correct or drop these lines")
    return found


def tokenise(session: Session, question: Question) -> list[tuple[list[int], range]]:
    """For each choice the ids of question and choice, and the positions from which the choice's tokens follow.

    Tokenised as one text: a token that would span the border belongs to the choice.
    """
    asked = session.text_ids((question.query + ASK).rstrip())
    rows = []
    for choice in question.choices:
        ids = session.text_ids(question.query + ASK + choice)
        start = max(1, len(common_prefix([asked, ids])))
        rows.append((ids, range(start - 1, len(ids) - 1)))
    return rows


def evaluate(
    session: Session,
    questions: Sequence[Question],
    rows: Sequence[tuple[list[int], range]],
    on_row: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"n", "accuracy", "accuracy_by_length"} with 95% intervals, and "chance", what guessing gets.

    `rows` are those of `tokenise`, question by question.
    """
    sums = []
    for (ids, at), logits_PV in zip(rows, session.score(rows), strict=True):
        sums.append(log_likelihood(logits_PV, [ids[i + 1] for i in at]))
        on_row()
    right, right_by_length, start = 0, 0, 0
    for question in questions:
        scores = np.array(sums[start : start + len(question.choices)])
        start += len(scores)
        right += int(scores.argmax()) == question.gold
        lengths = np.array([len(choice) for choice in question.choices])
        right_by_length += int((scores / lengths).argmax()) == question.gold
    return {
        "n": len(questions),
        "accuracy": wilson(right, len(questions)),
        "accuracy_by_length": wilson(right_by_length, len(questions)),
        "chance": sum(1 / len(question.choices) for question in questions) / len(questions),
    }


def log_likelihood(logits_PV: Logits, next_ids: Sequence[int]) -> float:
    """Sum of the log-probabilities (nats) of the tokens that follow the P positions."""
    top_P = logits_PV.max(axis=1)
    log_sum_P = np.log(np.exp(logits_PV - top_P[:, None]).sum(axis=1, dtype=np.float64)) + top_P
    return float((logits_PV[np.arange(len(next_ids)), next_ids] - log_sum_P).sum())
