"""How good a session's answers are on test rows: label, fields, reply and perplexity of the reference.

The gold label and fields are those of the reference answer's own first line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF

from edgeft.bench.rouge import rouge_l
from edgeft.bench.scores import (
    calibration,
    confusion,
    escalation,
    label_table,
    shares_of_labels,
    slice_table,
    slices_of,
    worst_slice,
)
from edgeft.bench.session import Logits, Session
from edgeft.bench.stats import bootstrap_macro_f1, bootstrap_mean, bootstrap_perplexity, wilson
from edgeft.bench.task import Task, reply_of
from edgeft.bench.told import Told, told
from edgeft.errors import DataError
from edgeft.text.answer import first_line_json
from edgeft.text.prefix import common_prefix

LABEL_FIELDS = ("json_valid", "intent_accuracy", "intent_macro_f1", "joint_exact_match")
REPLY_SCORES = ("chrf", "rouge_l")  # how near a reply comes to the reference's, 0 to 100
Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One test row, tokenised. `gold` is None when the reference answer has no JSON first line of the task's shape."""

    row_id: str | None
    prompt_ids: list[int]
    reference: str
    reference_ids: list[int]
    gold: dict[str, Any] | None
    slices: dict[str, str]


@dataclass(frozen=True)
class Accuracy:
    """Per-row results (no user text), the figures, the reasons of those that are None, and what lies under them."""

    rows: list[dict[str, Any]]
    figures: dict[str, Any]
    absent: dict[str, str]
    details: dict[str, Any]


@dataclass(frozen=True)
class _Scored:
    """What the reference answer's logits tell: nats per token, and how sure and right the choice at one token was."""

    nll: float
    chance: float | None
    hit: bool | None


def prepare(session: Session, rows: Sequence[dict[str, Any]], task: Task, prefix: Sequence[Message] = ()) -> list[Case]:
    """Tokenise test rows. A `prefix` (system text and examples) replaces a row's own system message."""
    cases = []
    slices = slices_of([row.get("meta") or {} for row in rows])
    for number, row in enumerate(rows, 1):
        *prompt, last = row["messages"]
        if last["role"] != "assistant" or not prompt:
            raise DataError(
                f"test row {number}: expected a conversation that ends with the assistant's answer, "
                f"found the last role {last['role']!r} after {len(prompt)} messages",
                "correct or drop the row",
            )
        if prefix:
            prompt = [*prefix, *(message for message in prompt if message["role"] != "system")]
        text = last["content"]
        parsed = first_line_json(text)
        row_id = row.get("id") or row.get("meta", {}).get("id")
        gold = parsed if task.complete(parsed) else None
        cases.append(Case(row_id, session.prompt_ids(prompt), text, session.answer_ids(text), gold, slices[number - 1]))
    return cases


def context_needed(cases: Sequence[Case], max_new_tokens: int) -> int:
    """Context in tokens that `evaluate` needs."""
    return max(len(case.prompt_ids) + max(max_new_tokens, len(case.reference_ids)) for case in cases) + 1


def evaluate(
    session: Session,
    cases: Sequence[Case],
    task: Task,
    max_new_tokens: int,
    on_row: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Answer every row greedily, with its reference as the draft: scoring that comes with it.

    `on_row` hears of every row that was read.
    """
    found: dict[int, Told] = {}

    def on_draft(index: int, logits_PV: Logits) -> None:
        found[index] = told(logits_PV, np.asarray(cases[index].reference_ids))
        on_row()

    ids = session.generate(
        [case.prompt_ids for case in cases], max_new_tokens, [case.reference_ids for case in cases], on_draft
    )
    return assess(session, cases, task, ids, [found[index] for index in range(len(cases))])


def assess(
    session: Session, cases: Sequence[Case], task: Task, ids: Sequence[Sequence[int]], told_of: Sequence[Told]
) -> Accuracy:
    """Judge answers that were given anywhere: `ids` are their tokens, `told_of` what was told of the references."""
    fork = len(common_prefix([case.reference_ids for case in cases]))
    scored = [_score(one, np.asarray(case.reference_ids), fork) for one, case in zip(told_of, cases, strict=True)]
    answers = [session.decode(answer) for answer in ids]
    predicted = [task.label(first_line_json(answer)) for answer in answers]
    known = {task.label(case.gold) for case in cases}
    results = [
        {"index": i, "id": case.row_id, **judge(case, answer, task), "nll": scored[i].nll,
         "num_answer_tokens": len(case.reference_ids), "num_prompt_tokens": len(case.prompt_ids),
         "num_said_tokens": len(ids[i]), "fork_chance": scored[i].chance, "fork_hit": scored[i].hit,
         "predicted": predicted[i] if predicted[i] in known else None,
         "slices": {"label": task.label(case.gold), **case.slices}}
        for i, (case, answer) in enumerate(zip(cases, answers, strict=True))
    ]  # fmt: skip
    figures, absent = aggregate(results, predicted, task)
    return Accuracy(results, figures, absent, details(results, predicted, task, figures))


def aggregate(
    results: Sequence[dict[str, Any]], predicted: Sequence[str | None], task: Task
) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures with 95% intervals over rows, and the reason of each that cannot be given."""
    absent: dict[str, str] = {}
    figures: dict[str, Any] = {"n": len(results)}
    judged = [i for i, row in enumerate(results) if row["json_valid"] is not None]
    for name, field in (("json_valid", "json_valid"), ("intent_accuracy", "intent_correct"),
                        ("joint_exact_match", "joint_correct")):  # fmt: skip
        figures[name] = wilson(sum(results[i][field] for i in judged), len(judged)) if judged else None
    gold, said = _labels(results, predicted)
    figures["intent_macro_f1"] = bootstrap_macro_f1(gold, said) if judged else None
    if not judged:
        absent |= dict.fromkeys(LABEL_FIELDS, task.why_no_gold())
    replies = [row for row in results if row["chrf"] is not None]
    for name in REPLY_SCORES:
        figures[f"reply_{name}"] = bootstrap_mean([row[name] for row in replies]) if replies else None
        if not replies:
            absent[f"reply_{name}"] = "no reference answer holds a reply"
    perplexity, low, high = bootstrap_perplexity(
        [row["nll"] * row["num_answer_tokens"] for row in results], [row["num_answer_tokens"] for row in results]
    )
    figures |= {"perplexity": perplexity, "perplexity_95": (low, high), "n_json": len(judged), "n_reply": len(replies)}
    figures["answer_tokens"] = float(np.median([row["num_answer_tokens"] for row in results]))
    figures["request_tokens"] = float(np.median([row["num_prompt_tokens"] for row in results]))
    sure = [row for row in results if row["fork_chance"] is not None]
    figures["ece"] = calibration(*_chances(sure))["ece"] if sure else None
    if not sure:
        absent["ece"] = "all reference answers are the same: there is no token at which they differ"
    passed = escalation(gold, said, task.escalation) if judged and task.escalation else {}
    for name in ("precision", "recall"):
        figures[f"escalation_{name}"] = passed.get(name)
        if name not in passed:
            absent[f"escalation_{name}"] = "no row of this kind" if passed else "task.escalation names no labels"
    return figures, absent


def details(
    results: Sequence[dict[str, Any]], predicted: Sequence[str | None], task: Task, figures: dict[str, Any]
) -> dict[str, Any]:
    """What lies under the figures, as JSON: labels, confusion, slices, calibration, escalation."""
    gold, said = _labels(results, predicted)
    table = slice_table(results)
    sure = [row for row in results if row["fork_chance"] is not None]
    found: dict[str, Any] = {"slices": table, "worst_slice": worst_slice(table, figures["joint_exact_match"])}
    if gold:
        precision, recall = shares_of_labels(gold, said)
        found |= {"labels": label_table(gold, said), "macro_precision": precision, "macro_recall": recall}
        found["confusion"] = confusion(gold, said)
    if sure:
        found["calibration"] = calibration(*_chances(sure))
    if gold and task.escalation:
        found["escalation"] = escalation(gold, said, task.escalation)
    return found


def _labels(results: Sequence[dict[str, Any]], predicted: Sequence[str | None]) -> tuple[list[str], list[str | None]]:
    """Gold and predicted label of the rows that have a gold answer."""
    judged = [i for i, row in enumerate(results) if row["json_valid"] is not None]
    return [results[i]["slices"]["label"] for i in judged], [predicted[i] for i in judged]


def _chances(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[bool]]:
    return [row["fork_chance"] for row in rows], [row["fork_hit"] for row in rows]


def judge(case: Case, answer: str, task: Task) -> dict[str, Any]:
    """What is right about one answer; None where the reference gives nothing to compare with."""
    said, wanted = reply_of(answer), reply_of(case.reference)
    scores: dict[str, float | None] = dict.fromkeys(REPLY_SCORES)
    if wanted:
        scores = {"chrf": float(CHRF().sentence_score(said, [wanted]).score), "rouge_l": rouge_l(said, wanted)}
    if case.gold is None:
        return {"json_valid": None, "intent_correct": None, "joint_correct": None, **scores}
    parsed = first_line_json(answer)
    intent = task.label(parsed) == task.label(case.gold)
    joint = intent and task.fields(parsed) == task.fields(case.gold)
    return {"json_valid": task.complete(parsed), "intent_correct": intent, "joint_correct": joint, **scores}


def _score(found: Told, reference_P: NDArray[np.int64], fork: int) -> _Scored:
    """`fork`: where the reference answers begin to differ, most often at the first token of the label."""
    nll = float(-found.next_logprob.mean())
    if fork >= len(reference_P):
        return _Scored(nll, None, None)
    hit = int(found.likeliest[fork]) == int(reference_P[fork])
    return _Scored(nll, float(np.exp(found.top_logprob[fork])), hit)
