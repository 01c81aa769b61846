"""A grammar (GBNF, llama.cpp's notation) of a task's first line, made from training rows, and answers held to it.

https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from edgeft.bench.accuracy import Case, judge
from edgeft.bench.session import Logits, Session
from edgeft.bench.stats import mcnemar_exact, wilson
from edgeft.bench.task import Task
from edgeft.errors import DataError
from edgeft.text.answer import first_line_json
from edgeft.text.split import sample

ROWS = 50  # answered both ways: held answers are generated one after another
FIGURES = {"json_valid": "json_valid", "intent_accuracy": "intent_correct", "joint_exact_match": "joint_correct"}
REST = r"""
value ::= string | number | "true" | "false" | "null" | list
list ::= "[" ( value ( ", " value )* )? "]"
string ::= "\"" ( [^"\\\x00-\x1f] | "\\" ( ["\\/bfnrt] | "u" [0-9a-fA-F]{4} ) )* "\""
number ::= "-"? [0-9]+ ( "." [0-9]+ )?
reply ::= "\n" [^\x00]*
"""


class Chooser(Protocol):
    """What keeps one answer inside a grammar."""

    def choose(self, logits_V: Logits) -> int:
        """The likeliest token that the grammar allows next; from then on it is part of the answer."""


@runtime_checkable
class HoldsToGrammar(Protocol):
    """A session that can hold an answer to a grammar."""

    def chooser(self, gbnf: str) -> Chooser:
        """One for each answer."""


def grammar_of(train: Sequence[dict[str, Any]], task: Task) -> str:
    """Labels and field names as they stand in the training answers; values are strings, numbers or lists of them,
    written and ordered as `json.dumps` and the first answer have it; the reply is free.

    Raises DataError if no answer begins with a JSON line of the task's two keys.
    """
    parsed = [first_line_json(row["messages"][-1]["content"]) for row in train]
    complete = [p for p in parsed if p is not None and task.complete(p) and set(p) == {task.label_key, task.fields_key}]
    if not complete:
        raise DataError(task.why_no_gold(), f"a grammar needs answers of {task.label_key!r} and {task.fields_key!r}")
    labels = sorted({str(task.label(p)) for p in complete})
    names = sorted({name for p in complete for name in p[task.fields_key]})
    parts = {
        task.label_key: "label",
        task.fields_key: "fields",
    }
    order = list(complete[0])  # of the keys, as the model has learned it
    line = ' ", " '.join(f'{_quoted(json.dumps(key))} ": " {parts[key]}' for key in order)
    pair = f'( {" | ".join(_quoted(json.dumps(name)) for name in names)} ) ": " value'
    rules = [
        f'root ::= "{{" {line} "}}" reply?',
        f"label ::= {' | '.join(_quoted(json.dumps(label)) for label in labels)}",
        'fields ::= "{" ( pair ( ", " pair )* )? "}"' if names else 'fields ::= "{}"',
        *([f"pair ::= {pair}"] if names else []),
    ]
    return "\n".join(rules) + REST


def evaluate(
    session: Session,
    holds: HoldsToGrammar,
    cases: Sequence[Case],
    free: Sequence[dict[str, Any]],
    task: Task,
    gbnf: str,
    max_new_tokens: int,
    on_row: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Answer `ROWS` rows, drawn from the whole test set, held to the grammar, beside the same rows' free results.

    Each figure comes as {"free", "held"} with 95% intervals and McNemar's exact p.
    """
    chosen = sample([i for i, case in enumerate(cases) if case.gold is not None], ROWS, seed=0)
    start = time.perf_counter()
    held = []
    for i in chosen:
        answer = _answer(session, holds.chooser(gbnf), cases[i].prompt_ids, max_new_tokens)
        held.append(judge(cases[i], session.decode(answer), task))
        on_row()
    found: dict[str, Any] = {"n": len(chosen), "held_s_per_row": (time.perf_counter() - start) / max(1, len(chosen))}
    for figure, name in FIGURES.items() if chosen else ():
        pairs = [(bool(free[i][name]), bool(row[name])) for i, row in zip(chosen, held, strict=True)]
        lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        found[figure] = {
            "free": wilson(sum(a for a, _ in pairs), len(pairs)),
            "held": wilson(sum(b for _, b in pairs), len(pairs)),
            "p": mcnemar_exact(lost, won),
        }
    return found


def _answer(session: Session, chooser: Chooser, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    logits_V = session.prefill(prompt_ids)
    answer: list[int] = []
    while len(answer) < max_new_tokens and (token := chooser.choose(logits_V)) not in session.stop_ids:
        answer.append(token)
        logits_V = session.step(token)
    return answer


def _quoted(text: str) -> str:
    r"""A GBNF literal: "\"refund\"" for the JSON text "refund"."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
