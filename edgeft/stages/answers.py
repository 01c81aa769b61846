"""answers: the teacher answers the training prompts or a transfer set itself, for the student to learn."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.errors import DataError
from edgeft.formats.hf import load_model
from edgeft.plan import AnswersNode
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.dataset import write_lines
from edgeft.text.encode import ANSWERS, TRANSFER, read_rows
from edgeft.tune.answers import agree, answer_all
from edgeft.tune.precision import settled_compute

LABELLED, VALIDATION = "train.jsonl", "validation.jsonl"
DISAGREEING = "disagreeing"


def run(cfg: AnswersNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the teacher), dataset, transfer (if there is one). Writes a dataset to distil on.

    Its train.jsonl holds the labelled rows and, after them, the teacher's, each marked as such; answers.json says how
    many there are of both. Raises DataError if no answer can be used.
    """
    dataset = inputs["dataset"]
    labelled = read_rows(dataset.file(LABELLED))
    asked = list(labelled) if cfg.own else []
    if "transfer" in inputs:
        asked += read_rows(inputs["transfer"].file(TRANSFER))
    told, resumed = _told(cfg, inputs["model"].path, asked, out / CHECKPOINT_DIR, report)
    taught, left_out, agreeing = [], Counter[str](), 0
    for number, (row, turns) in enumerate(zip(asked, told, strict=True)):
        if isinstance(turns, str):
            left_out[turns] += 1
            continue
        if cfg.own and number < len(labelled):
            same = agree(turns[-1]["content"], row["messages"][-1]["content"])
            agreeing += same
            if cfg.keep == "agreeing" and not same:
                left_out[DISAGREEING] += 1
                continue
        taught.append({"messages": turns, "meta": {**row["meta"], "source": "teacher"}})
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    report.note(f"the teacher's answers: {len(taught)}" + (f" (left out: {reasons})" if reasons else ""))
    if not taught:
        raise DataError(f"none of the teacher's {len(asked)} answers can be used ({reasons})", "train it longer")
    write_lines(out / LABELLED, labelled + taught)
    shutil.copyfile(dataset.file(VALIDATION), out / VALIDATION)
    (out / ANSWERS).write_text(json.dumps({"labelled": len(labelled), "taught": len(taught)}), "utf-8")
    return {
        "asked": len(asked),
        "kept": len(taught),
        "left_out": dict(sorted(left_out.items())),
        "labelled_rows": len(labelled),
        **({"agreeing": agreeing} if cfg.own else {}),
        "resumed_shards": resumed,
    }


def _told(
    cfg: AnswersNode, teacher: Path, asked: list[dict[str, Any]], unfinished: Path, report: Reporter
) -> tuple[list[list[dict[str, str]] | str], int]:
    """What `answer_all` says of each row, and how many shards an earlier try had finished."""
    unfinished.mkdir(exist_ok=True)
    starts = range(0, len(asked), cfg.shard_rows)
    paths = [unfinished / f"answers-{number:05d}.json" for number in range(len(starts))]
    done = sum(path.is_file() for path in paths)
    if done < len(paths):
        chat, compute = ChatTokenizer.from_folder(teacher), settled_compute(unfinished, cfg.precision)
        model = load_model(teacher, compute.dtype).to(compute.device)  # type: ignore[arg-type]
        with report.track("the teacher answers", len(paths), done) as bar:
            for path, start in zip(paths, starts, strict=True):
                if not path.is_file():
                    part = [row["messages"] for row in asked[start : start + cfg.shard_rows]]
                    beside = path.with_suffix(".writing")
                    beside.write_text(json.dumps(answer_all(model, chat, part, cfg.max_tokens)), "utf-8")
                    beside.replace(path)
                    bar.advance()
    return [told for path in paths for told in json.loads(path.read_text("utf-8"))], done
