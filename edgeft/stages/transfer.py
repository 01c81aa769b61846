"""transfer: messages without answers, cleaned of what stands in the splits; the teacher is to answer them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact
from edgeft.errors import DataError
from edgeft.plan import TransferNode
from edgeft.progress import Reporter
from edgeft.text.complete import with_system
from edgeft.text.dataset import describe, write_report, write_rows
from edgeft.text.encode import TRANSFER, read_rows
from edgeft.text.rows import PROMPT_HINT, Row, load_rows, parse_prompt, raise_problems
from edgeft.text.split import clean_transfer

SPLITS = ("train", "validation", "test")


def run(cfg: TransferNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Input: dataset. Writes transfer.jsonl and data_report.json.

    Raises DataError with all bad rows at once, or if no row is left.
    """
    read, problems = load_rows(cfg.transfer, parse_prompt)
    raise_problems(problems, PROMPT_HINT)
    splits = [_rows(inputs["dataset"].file(f"{name}.jsonl")) for name in SPLITS]
    kept, dropped = clean_transfer([with_system(row, cfg.system) for row in read], *splits)
    if not kept:
        raise DataError(
            f"{cfg.transfer}: all {len(read)} rows stand in train, validation or test too",
            "name other rows as data.transfer, or leave it out",
        )
    write_rows(out / TRANSFER, kept)
    write_report(out, {"splits": {"transfer": describe(kept, len(read), dropped)}})
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    report.note(f"transfer: {len(kept)} rows" + (f" (left out: {reasons})" if reasons else ""))
    return {"transfer_rows": len(kept), "dropped": dict(sorted(dropped.items()))}


def _rows(path: Path) -> list[Row]:
    return [Row(tuple(row["messages"]), row["meta"], path.name, row) for row in read_rows(path)]
