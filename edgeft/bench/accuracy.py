"""How good a session's answers are on test rows: label, fields, reply and perplexity of the reference.

The gold label and fields are those of the reference answer's own first line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF

from edgeft.bench.session import Logits, Session
from edgeft.bench.stats import bootstrap_macro_f1, bootstrap_mean, bootstrap_perplexity, wilson
from edgeft.bench.task import Task, reply_of
from edgeft.errors import DataError
from edgeft.text.answer import first_line_json

GENERATE_ROWS = 96  # rows between two progress reports; the session batches inside
Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One test row, tokenised. `gold` is None when the reference answer has no JSON first line of the task's shape."""

    row_id: str | None
    prompt_ids: list[int]
    reference: str
    reference_ids: list[int]
    gold: dict[str, Any] | None


@dataclass(frozen=True)
class Accuracy:
    """Per-row results (no user text), the figures, and the reasons of those that are None."""

    rows: list[dict[str, Any]]
    figures: dict[str, Any]
    absent: dict[str, str]


@dataclass(frozen=True)
class _Draft:
    """What scoring a reference answer tells: nats per token, and how many first tokens are the model's own choice."""

    nll: float
    agreed: int


def prepare(session: Session, rows: Sequence[dict[str, Any]], task: Task, prefix: Sequence[Message] = ()) -> list[Case]:
    """Tokenise test rows. A `prefix` (system text and examples) replaces a row's own system message."""
    cases = []
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
        cases.append(Case(row_id, session.prompt_ids(prompt), text, session.answer_ids(text), gold))
    return cases


def context_needed(cases: Sequence[Case], max_new_tokens: int) -> int:
    """Context in tokens that `evaluate` needs."""
    return max(len(case.prompt_ids) + max(max_new_tokens, len(case.reference_ids)) for case in cases) + 1


def evaluate(
    session: Session,
    cases: Sequence[Case],
    task: Task,
    max_new_tokens: int,
    on_rows: Callable[[str, int], None] = lambda what, count: None,
) -> Accuracy:
    """Score the reference answers, then answer every row greedily; `on_rows` hears of finished rows."""
    drafts = _score_references(session, cases, on_rows)
    answers = _answers(session, cases, [draft.agreed for draft in drafts], max_new_tokens, on_rows)
    chrf = CHRF()
    results = [
        {"index": i, "id": case.row_id, **_judge(case, answer, task, chrf), "nll": draft.nll,
         "num_answer_tokens": len(case.reference_ids), "slices": {"label": task.label(case.gold)}}
        for i, (case, answer, draft) in enumerate(zip(cases, answers, drafts, strict=True))
    ]  # fmt: skip
    predicted = [task.label(first_line_json(answer)) for answer in answers]
    figures, absent = aggregate(results, predicted, task)
    return Accuracy(results, figures, absent)


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
    gold = [results[i]["slices"]["label"] for i in judged]
    figures["intent_macro_f1"] = bootstrap_macro_f1(gold, [predicted[i] for i in judged]) if judged else None
    if not judged:
        absent |= dict.fromkeys(
            ("json_valid", "intent_accuracy", "intent_macro_f1", "joint_exact_match"), task.why_no_gold()
        )
    scores = [row["chrf"] for row in results if row["chrf"] is not None]
    figures["reply_chrf"] = bootstrap_mean(scores) if scores else None
    if not scores:
        absent["reply_chrf"] = "no reference answer holds a reply"
    perplexity, low, high = bootstrap_perplexity(
        [row["nll"] * row["num_answer_tokens"] for row in results], [row["num_answer_tokens"] for row in results]
    )
    figures |= {"perplexity": perplexity, "perplexity_95": (low, high), "n_json": len(judged), "n_reply": len(scores)}
    return figures, absent


def _judge(case: Case, answer: str, task: Task, chrf: CHRF) -> dict[str, Any]:
    wanted = reply_of(case.reference)
    score = float(chrf.sentence_score(reply_of(answer), [wanted]).score) if wanted else None
    if case.gold is None:
        return {"json_valid": None, "intent_correct": None, "joint_correct": None, "chrf": score}
    parsed = first_line_json(answer)
    intent = task.label(parsed) == task.label(case.gold)
    joint = intent and task.fields(parsed) == task.fields(case.gold)
    return {"json_valid": task.complete(parsed), "intent_correct": intent, "joint_correct": joint, "chrf": score}


def _score_references(session: Session, cases: Sequence[Case], on_rows: Callable[[str, int], None]) -> list[_Draft]:
    rows = [
        ([*case.prompt_ids, *case.reference_ids],
         range(len(case.prompt_ids) - 1, len(case.prompt_ids) + len(case.reference_ids) - 1))
        for case in cases
    ]  # fmt: skip
    drafts = []
    for case, logits_PV in zip(cases, session.score(rows), strict=True):
        reference_P = np.asarray(case.reference_ids)
        differs_P = logits_PV.argmax(axis=1) != reference_P
        agreed = int(differs_P.argmax()) if differs_P.any() else len(reference_P)
        drafts.append(_Draft(_mean_nll(logits_PV, reference_P), agreed))
        on_rows("perplexity", 1)
    return drafts


def _answers(
    session: Session,
    cases: Sequence[Case],
    agreed: Sequence[int],
    max_new_tokens: int,
    on_rows: Callable[[str, int], None],
) -> list[str]:
    """The greedy answers. Where the likeliest tokens are the reference's own, scoring it has already found them.

    This is speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with the reference answer as the draft: its
    first `agreed` tokens are those that the model itself chooses one after the other, so only the rest is generated.
    """
    answers: list[str] = []
    for start in range(0, len(cases), GENERATE_ROWS):
        chunk = range(start, min(start + GENERATE_ROWS, len(cases)))
        found = {i: cases[i].reference_ids[: agreed[i]] for i in chunk}
        open_ended = [i for i in chunk if not session.stop_ids.intersection(found[i])]
        prompts = [[*cases[i].prompt_ids, *found[i]] for i in open_ended]
        for i, rest in zip(open_ended, session.generate(prompts, max_new_tokens), strict=True):
            found[i] = [*found[i], *rest]
        answers += [session.decode(_until_stop(found[i], session.stop_ids)[:max_new_tokens]) for i in chunk]
        on_rows("answers", len(chunk))
    return answers


def _until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids before the first stop token."""
    return list(takewhile(lambda token: token not in stop_ids, ids))


def _mean_nll(logits_PV: Logits, next_ids_P: NDArray[np.int64]) -> float:
    top_P = logits_PV.max(axis=1)
    exp_PV = np.exp(logits_PV - top_P[:, None])  # float32; the sum over the vocabulary is float64
    log_sum_P = np.log(exp_PV.sum(axis=1, dtype=np.float64)) + top_P
    return float((log_sum_P - logits_PV[np.arange(len(next_ids_P)), next_ids_P]).mean())
