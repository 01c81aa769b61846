"""The prompt that shows an untouched model the task: a system text made from the training rows, and a few of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from edgeft.bench.task import Task, reply_of
from edgeft.text.answer import first_line_json

Row = dict[str, Any]


def few_shot_prefix(train: Sequence[Row], task: Task, count: int) -> list[dict[str, Any]]:
    """A system message and `count` examples as user and assistant turns; the same for the same rows.

    Examples are spread over the labels; within a label, rows with its usual fields come first, short before long.
    """
    if count <= 0 or not train:
        return []
    text = system_text(train, task)
    prefix = [{"role": "system", "content": text}] if text else []
    for row in choose(train, task, count):
        prefix += [m for m in row["messages"] if m["role"] != "system"]
    return prefix


def system_text(train: Sequence[Row], task: Task) -> str:
    """The rows' own system message, and what an answer looks like: labels and field names found in `train`."""
    parsed = [p for row in train if task.complete(p := first_line_json(_answer(row)))]
    own = Counter(row["messages"][0]["content"] for row in train if row["messages"][0]["role"] == "system")
    parts = [own.most_common(1)[0][0]] if own else []
    if parsed:
        labels = sorted({str(task.label(p)) for p in parsed})
        names = sorted({name for p in parsed for name in task.fields(p) or {}})
        parts.append(
            f'The first line of every answer is a JSON object with the keys "{task.label_key}" and '
            f'"{task.fields_key}".\n"{task.label_key}" is one of: {", ".join(labels)}.\n'
            f'"{task.fields_key}" is an object that holds the values found in the message; '
            f"its keys are taken from: {', '.join(names) or 'none'}."
        )
        if any(reply_of(_answer(row)) for row in train):
            parts.append("The reply follows on the next line.")
    return "\n".join(parts)


def choose(train: Sequence[Row], task: Task, count: int) -> list[Row]:
    """`count` rows: one per label from labels evenly spaced in alphabetical order, then second ones, and so on."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in train:
        groups[task.label(first_line_json(_answer(row))) or ""].append(row)
    ranked = [_usual_and_short_first(groups[label], task) for label in sorted(groups)]
    chosen: list[Row] = []
    while len(chosen) < min(count, len(train)):
        left = [rows for rows in ranked if rows]
        take = min(count - len(chosen), len(left))
        chosen += [left[i * len(left) // take].pop(0) for i in range(take)]
    return chosen


def _usual_and_short_first(rows: list[Row], task: Task) -> list[Row]:
    names = [tuple(sorted(task.fields(first_line_json(_answer(row))) or {})) for row in rows]
    usual = min(Counter(names).items(), key=lambda item: (-item[1], item[0]))[0]
    length = [sum(len(m["content"]) for m in row["messages"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (names[i] != usual, length[i], i))
    return [rows[i] for i in order]


def _answer(row: Row) -> str:
    text: str = row["messages"][-1]["content"]
    return text
