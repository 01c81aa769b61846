"""data: the user's rows become three clean splits of conversations that do not leak into each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact
from edgeft.errors import DataError
from edgeft.progress import Reporter
from edgeft.settings import DataSettings
from edgeft.text import split
from edgeft.text.complete import find_field, with_system, with_target
from edgeft.text.dataset import as_record, describe, write_lines, write_report, write_rows
from edgeft.text.encode import REPLAY
from edgeft.text.rows import Row, load_rows, raise_problems

SPLITS = ("train", "validation", "test")
Splits = dict[str, list[Row]]


def run(cfg: DataSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Write train, validation and test.jsonl, replay.jsonl if asked for, and data_report.json.

    Raises DataError with all bad rows at once.
    """
    read = load_splits(cfg)
    warnings = _source_warnings(cfg, read)
    rows, dropped, found = separate({name: [with_system(row, cfg.system) for row in read[name]] for name in SPLITS})
    warnings |= found
    limits = {"train": cfg.max_train_rows, "validation": cfg.max_eval_rows, "test": cfg.max_eval_rows}
    for name in SPLITS:
        sampled = split.sample(rows[name], limits[name], cfg.seed)
        dropped[name]["not_sampled"] = len(rows[name]) - len(sampled)
        rows[name] = sampled
        write_rows(out / f"{name}.jsonl", rows[name])
    replay = _replay(cfg, rows)
    if cfg.replay:
        write_lines(out / REPLAY, replay)
        report.note(f"replay: {len(replay)} rows")
    summary = {
        "splits": {name: describe(rows[name], len(read[name]), +dropped[name]) for name in SPLITS},
        "warnings": warnings,
    }
    write_report(out, summary)
    for name in SPLITS:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted((+dropped[name]).items()))
        report.note(f"{name}: {len(rows[name])} rows" + (f" (left out: {reasons})" if reasons else ""))
    for text in warnings.values():
        report.note(f"WARNING {text}")
    metrics: dict[str, Any] = {f"{name}_rows": len(rows[name]) for name in SPLITS} | {"replay_rows": len(replay)}
    return {
        **metrics,
        "dropped": {name: dict(sorted((+dropped[name]).items())) for name in SPLITS},
        "warnings": sorted(warnings),
    }


def load_splits(cfg: DataSettings) -> Splits:
    """Rows of the three sources with their target lines. Raises DataError with the problems of all three."""
    problems: list[str] = []
    sources = {"train": cfg.train, "validation": cfg.validation, "test": cfg.test}
    loaded = {source: load_rows(source) for source in dict.fromkeys(sources.values())}
    for rows, bad in loaded.values():
        problems += bad
        for number, row in enumerate(rows):
            try:
                rows[number] = with_target(row, cfg.target_field) if cfg.target_field else row
            except ValueError as error:
                problems.append(f"{row.where}: {error}")
    raise_problems(problems)
    return {name: loaded[source][0] for name, source in sources.items()}


def separate(read: Splits) -> tuple[Splits, dict[str, Counter[str]], dict[str, str]]:
    """(splits without duplicates and leaks, dropped rows by split and reason, warnings).

    Raises DataError if that leaves no train row.
    """
    dropped: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
    warnings: dict[str, str] = {}
    validation = split.clean_validation(read["validation"], read["test"])
    if validation:
        dropped["validation"]["in_test"] = len(read["validation"]) - len(validation)
    else:
        validation = read["validation"]
        warnings["validation_is_test"] = (
            "every validation row stands in test too: checkpoints are chosen on the rows they are tested on, "
            "so the test figures are somewhat too good"
        )
    train, dropped["train"] = split.clean_train(read["train"], validation, read["test"])
    if not train:
        raise DataError(
            f"no train row is left: all {len(read['train'])} stand in validation or test too",
            "name other rows as data.train; rows that differ only in numbers or entity values count as the same",
        )
    if differing := dropped["train"]["duplicate_with_other_answer"]:
        warnings["answers_differ"] = (
            f"{differing} train rows repeat another with a different answer; the first was kept"
        )
    return {"train": train, "validation": validation, "test": read["test"]}, dropped, warnings


def _replay(cfg: DataSettings, rows: Splits) -> list[dict[str, Any]]:
    """Rows {"messages", "meta"} or {"text"} to learn beside the others; none that stands in validation or test."""
    if not cfg.replay:
        return []
    found: list[dict[str, Any]]
    if cfg.replay.endswith(".txt"):
        path = Path(cfg.replay)
        if not path.is_file():
            raise DataError(f"{path}: no such file", "correct data.replay")
        try:
            paragraphs = path.read_text("utf-8").split("\n\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
        found = [{"text": text} for part in paragraphs if (text := part.strip())]
    else:
        loaded, problems = load_rows(cfg.replay)
        raise_problems(problems)
        found = [as_record(row) for row in split.clean_train(loaded, rows["validation"], rows["test"])[0]]
    if not found:
        raise DataError(f"{cfg.replay}: no row that could be replayed", "name other rows as data.replay")
    return split.sample(found, round(len(rows["train"]) * cfg.replay_share / (1 - cfg.replay_share)), cfg.seed)


def _source_warnings(cfg: DataSettings, read: Splits) -> dict[str, str]:
    warnings = {}
    if field := cfg.target_field:
        lacking = sum(find_field(row, field) is None for name in SPLITS for row in read[name])
        if lacking:
            warnings["target_missing"] = f"{lacking} rows have no {field}; their answers are left as they are"
    unpinned = [s for s in (cfg.train, cfg.validation, cfg.test) if s.startswith("hub:") and "@" not in s]
    if unpinned:
        warnings["hub_not_pinned"] = f"{unpinned[0]} may change: pin it as hub:ORG/NAME@COMMIT/SPLIT"
    return warnings
