"""targets: the teacher runs once over the training rows; its probabilities are kept for the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.artifact import CHECKPOINT_DIR, Artifact
from edgeft.formats.hf import load_model
from edgeft.learning_settings import TargetSettings
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.precision import place, settled_compute
from edgeft.tune.targets import save_shard, teacher_targets


def run(cfg: TargetSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the teacher), dataset. Writes `shard-*.safetensors` and `index.json`."""
    teacher = inputs["model"]
    chat = ChatTokenizer.from_folder(teacher.path)
    rows = load_encoded(inputs["dataset"].file("train.jsonl"), chat, cfg.max_tokens)
    shards = [range(i, min(i + cfg.shard_rows, len(rows))) for i in range(0, len(rows), cfg.shard_rows)]
    names = [f"shard-{number:05d}.safetensors" for number in range(len(shards))]
    unfinished = out / CHECKPOINT_DIR
    unfinished.mkdir(exist_ok=True)
    done = sum((unfinished / name).is_file() for name in names)
    compute = settled_compute(unfinished, cfg.precision)
    if done < len(shards):
        model = place(load_model(teacher.path, compute.dtype), compute, max(len(row.ids) for row in rows))
        with report.track("teacher answers", len(shards), done) as bar:
            for name, numbers in zip(names, shards, strict=True):
                if not (unfinished / name).is_file():
                    part = [rows[i] for i in numbers]
                    kept = teacher_targets(
                        model, part, cfg.top_k, cfg.temperature, chat.pad_id, compute.device, chat.end_id
                    )
                    save_shard(unfinished / name, kept)
                    bar.advance()
    for name in names:
        (unfinished / name).replace(out / name)
    positions = sum(sum(row.trained) for row in rows)
    index = {
        "top_k": cfg.top_k,
        "temperature": cfg.temperature,
        "rows": len(rows),
        "positions": positions,
        "shards": names,
    }
    (out / "index.json").write_text(json.dumps(index), "utf-8")
    size = sum((out / name).stat().st_size for name in names)
    return {
        "rows": len(rows),
        "positions": positions,
        "bytes_per_token": round(size / positions, 1),
        "resumed_shards": done,
    }
