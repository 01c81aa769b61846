"""What lies under the headline figures: per label, per slice, how sure the model was, what it should have passed on.

All of it is computed from the per-row results, so it can be computed again without the model. A triple is
(value, low, high) with a 95% interval.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from edgeft.bench.stats import Triple, bootstrap_ece, wilson

Row = dict[str, Any]

MIN_SLICE = 20  # rows below which a share says nothing; also what keeps rare values of `meta` out of the records
MAX_VALUES = 64  # a field with more different values is no slice but an id
BINS = 10
NO_LABEL, OTHER_LABEL = "(no label)", "(unknown label)"


def slices_of(metas: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Per row, the `meta` fields to slice by: those with 2 to 64 different short values, of values of 20 rows or more.

    A value that fewer rows have is left out: it could be a row's own text.
    """
    fields = sorted({name for meta in metas for name, value in meta.items() if isinstance(value, str | bool | int)})
    kept: list[dict[str, str]] = [{} for _ in metas]
    for name in fields:
        texts = [str(meta[name]) if isinstance(meta.get(name), str | bool | int) else None for meta in metas]
        counts = Counter(text for text in texts if text is not None)
        if not 2 <= len(counts) <= MAX_VALUES:
            continue
        for row, text in zip(kept, texts, strict=True):
            if text is not None and counts[text] >= MIN_SLICE:
                row[name] = text
    return kept


def slice_table(rows: Sequence[Row], score: str = "joint_correct") -> list[dict[str, Any]]:
    """Every slice of 20 rows or more with its share of right rows, the worst first."""
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows:
        if row[score] is not None:
            for name, value in row["slices"].items():
                groups[name, str(value)].append(bool(row[score]))
    table = [
        {"field": name, "value": value, "n": len(hits), "share": wilson(sum(hits), len(hits))}
        for (name, value), hits in groups.items()
        if len(hits) >= MIN_SLICE
    ]
    return sorted(table, key=lambda entry: (entry["share"][0], -entry["n"], entry["field"], entry["value"]))


def worst_slice(table: Sequence[dict[str, Any]], overall: Triple | None) -> dict[str, Any] | None:
    """The slice with the lowest share, and whether its interval lies below the share of all rows."""
    if not table or overall is None:
        return None
    return {**table[0], "looked_at": len(table), "clearly_worse": table[0]["share"][2] < overall[0]}


def label_table(gold: Sequence[str], predicted: Sequence[str | None]) -> list[dict[str, Any]]:
    """Precision, recall (with interval) and F1 of every label, the commonest first; None where there is no row."""
    wanted, said = Counter(gold), Counter(predicted)
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    table = []
    for label in sorted(wanted, key=lambda name: (-wanted[name], name)):
        table.append(
            {
                "label": label,
                "n": wanted[label],
                "predicted": said[label],
                "precision": hits[label] / said[label] if said[label] else None,
                "recall": wilson(hits[label], wanted[label]),
                "f1": 2 * hits[label] / (wanted[label] + said[label]),
            }
        )
    return table


def confusion(gold: Sequence[str], predicted: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """{gold label: {predicted label: rows}}; what is no label of the references is counted together."""
    known = set(gold)
    matrix: dict[str, Counter[str]] = {label: Counter() for label in sorted(known)}
    for wanted, said in zip(gold, predicted, strict=True):
        matrix[wanted][NO_LABEL if said is None else said if said in known else OTHER_LABEL] += 1
    return {label: dict(sorted(row.items())) for label, row in matrix.items()}


def escalation(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> dict[str, Any]:
    """How well the rows that a person has to answer (gold label in `labels`) are told from the others.

    A share without a row below its line is left out.
    """
    wanted, said = [g in labels for g in gold], [p in labels for p in predicted]
    hits = sum(w and s for w, s in zip(wanted, said, strict=True))
    found: dict[str, Any] = {"labels": list(labels), "rows": sum(wanted), "passed_on": sum(said), "rightly": hits}
    if sum(said):
        found["precision"] = wilson(hits, sum(said))
    if sum(wanted):
        found["recall"] = wilson(hits, sum(wanted))
    return found


def calibration(chances: Sequence[float], hits: Sequence[bool]) -> dict[str, Any]:
    """Expected calibration error with its bins (Guo et al. 2017, arXiv:1706.04599): how far confidence is from truth.

    `chances` are the probabilities of the likeliest token, `hits` whether it was the reference's. The bins are
    ten of equal width.
    """
    bins = []
    at = [min(int(chance * BINS), BINS - 1) for chance in chances]
    for number in range(BINS):
        inside = [i for i, found in enumerate(at) if found == number]
        if inside:
            mean = sum(chances[i] for i in inside) / len(inside)
            share = sum(hits[i] for i in inside) / len(inside)
            bins.append({"from": number / BINS, "n": len(inside), "confidence": mean, "right": share})
    return {"n": len(chances), "ece": bootstrap_ece(chances, hits, BINS), "bins": bins}


def shares_of_labels(gold: Sequence[str], predicted: Sequence[str | None]) -> tuple[float, float]:
    """Macro precision and macro recall: means over the labels that occur; a label never said has precision 0."""
    table = label_table(gold, predicted)
    precision = sum(entry["precision"] or 0.0 for entry in table) / len(table)
    return precision, sum(entry["recall"][0] for entry in table) / len(table)
