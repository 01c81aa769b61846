"""What the table says in a few sentences: every number is computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeft.bench.stats import bootstrap_ratio, mcnemar_exact
from edgeft.bench.table import package_label

Row = dict[str, Any]
SURE = 0.05  # largest p of a difference
PREFERRED = ("gguf", "q8_0")  # the pair that is compared first: small loss, runs everywhere


@dataclass(frozen=True)
class Claim:
    """One figure, what it is, and what it rests on."""

    value: str
    what: str
    detail: str


def claims(rows: Sequence[Row], joint_hits: dict[str, list[bool]]) -> list[Claim]:
    """Headlines. `joint_hits` maps 'name package' to whether each test row's label and fields were all right."""
    found = _student_claims(rows, joint_hits)
    best = pick(rows, joint_hits)
    if best:
        found.append(_pick_claim(best))
        found += _floor_claims(best, rows)
    return found


def as_text(found: Sequence[Claim]) -> list[dict[str, str]]:
    return [asdict(claim) for claim in found]


def key_of(row: Row) -> str:
    return f"{row['name']} {package_label(row)}"


def pair(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """Student and teacher in the same kind of package, or None if there is no such pair."""
    teachers = {(r["format"], r["quant"]): r for r in rows if r["name"] == "teacher"}
    students = {(r["format"], r["quant"]): r for r in rows if r["name"] == "student"}
    both = sorted(teachers.keys() & students.keys(), key=lambda kind: (kind != PREFERRED, kind))
    return (students[both[0]], teachers[both[0]]) if both else None


def pick(rows: Sequence[Row], joint_hits: dict[str, list[bool]]) -> Row | None:
    """Our smallest package that is not measurably worse than the best in joint exact match; None if all are 0.

    Measurably: McNemar's exact test over the same rows gives p < 0.05; where the rows are not there, its share lies
    below the best one's 95% interval.
    """
    ours = [r for r in rows if r["name"] in ("teacher", "student") and r["joint_exact_match"] and r["bytes"]]
    if not any(r["joint_exact_match"][0] for r in ours):
        return None
    best = max(ours, key=lambda r: (r["joint_exact_match"][0], -r["bytes"]))
    return min((r for r in ours if not _worse(r, best, joint_hits)), key=lambda r: r["bytes"])


def _worse(row: Row, best: Row, joint_hits: dict[str, list[bool]]) -> bool:
    some, all_ = (joint_hits.get(key_of(one), []) for one in (row, best))
    if not some or len(some) != len(all_):
        return bool(row["joint_exact_match"][0] < best["joint_exact_match"][1])
    won, lost = (sum(a and not b for a, b in zip(*both, strict=True)) for both in ((some, all_), (all_, some)))
    return lost > won and mcnemar_exact(lost, won) < SURE


def _student_claims(rows: Sequence[Row], joint_hits: dict[str, list[bool]]) -> list[Claim]:
    both = pair(rows)
    if both is None:
        return []
    student, teacher = both
    kind = f"both {package_label(student)}"
    found = []
    if student["joint_exact_match"] and teacher["joint_exact_match"] and teacher["joint_exact_match"][0]:
        share = student["joint_exact_match"][0] / teacher["joint_exact_match"][0]
        detail = f"{_share(student)} against {_share(teacher)}, n = {teacher['n_json']}, {kind}"
        ours, theirs = (joint_hits.get(key_of(row), []) for row in both)
        if ours and len(ours) == len(theirs):
            _, low, high = bootstrap_ratio(ours, theirs)
            detail += f"; 95% interval of the ratio {100 * low:.1f}-{100 * high:.1f}%, paired"
        found.append(Claim(f"{100 * share:.1f}%", "of the teacher's joint exact match is kept by the student", detail))
    if student["bytes"] and teacher["bytes"]:
        detail = f"{student['bytes'] / 1e6:.1f} MB against {teacher['bytes'] / 1e6:.1f} MB, {kind}"
        ratio = student["bytes"] / teacher["bytes"]
        found.append(Claim(f"{ratio:.2f} \N{MULTIPLICATION SIGN}", "the teacher's size", detail))
    if student["decode_tps"] and teacher["decode_tps"]:
        ratio = student["decode_tps"] / teacher["decode_tps"]
        detail = f"{student['decode_tps']:.0f} tokens/s against {teacher['decode_tps']:.0f}, {kind}"
        found.append(Claim(f"{ratio:.2f} \N{MULTIPLICATION SIGN}", "the teacher's decode speed", detail))
    return found


def _pick_claim(row: Row) -> Claim:
    speed = f", {row['decode_tps']:.0f} tokens/s" if row["decode_tps"] else ""
    return Claim(
        f"{row['bytes'] / 1e6:.3g} MB",
        f"is the smallest package not measurably worse than the best: {key_of(row)}",
        f"joint exact match {_share(row)}{speed}",
    )


def _floor_claims(best: Row, rows: Sequence[Row]) -> list[Claim]:
    found = []
    for floor in rows:
        if floor["name"] == "base_fewshot" and floor["joint_exact_match"]:
            shots = (floor["conditions"] or {}).get("few_shot")
            what = f"joint exact match of the untouched base model with {shots} examples in its prompt"
            found.append(Claim(_share(floor), what, f"{key_of(best)}: {_share(best)}"))
        if floor["name"] == "svm" and floor["intent_accuracy"] and best["intent_accuracy"]:
            what = "of the labels are named right by a linear classifier, which writes no answer and finds no fields"
            detail = f"{key_of(best)}: {_share(best, 'intent_accuracy')}, n = {best['n_json']}"
            found.append(Claim(_share(floor, "intent_accuracy"), what, detail))
    return found


def _share(row: Row, field: str = "joint_exact_match") -> str:
    return f"{100 * row[field][0]:.1f}%"
