"""shape: how large a student may be to decode as fast as asked, timed with random weights, here or on a target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgeft.artifact import Artifact
from edgeft.bench.devices.pace import pace
from edgeft.bench.host import physical_cores
from edgeft.bench.race import decode_speedup
from edgeft.formats.gguf import write_gguf
from edgeft.formats.gguf_quant import quantize
from edgeft.formats.hf import read_config, save_model, write_json
from edgeft.learning_settings import StudentSettings
from edgeft.plan import ShapeNode
from edgeft.progress import Reporter
from edgeft.shrink.goal import goal_of
from edgeft.shrink.shape import MEASUREMENTS, SHAPE, Shape, find_shape
from edgeft.shrink.vocabulary import choose_tokens, cut_token_ids, cut_tokenizer
from edgeft.text.chat import ChatTokenizer, read_json
from edgeft.text.encode import load_encoded


def run(cfg: ShapeNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the teacher), dataset. Writes `shape.json`: the layers and FFN width to cut to, beside what the
    settings say of hidden width, KV heads and vocabulary."""
    teacher = inputs["model"].path
    whole = Shape.of(read_config(teacher))
    asked = StudentSettings(layers=whole.layers, hidden=cfg.hidden, kv_heads=cfg.kv_heads)
    goal = goal_of(asked, AutoConfig.from_pretrained(teacher))
    kept = _tokens(cfg, teacher, inputs["dataset"]) if (cfg.vocabulary or whole.vocabulary) < whole.vocabulary else None
    largest = whole.narrowed(len(kept) if kept else whole.vocabulary, goal.hidden, goal.kv_heads)
    with TemporaryDirectory(prefix="edgeft-") as temporary, report.track("shapes timed", MEASUREMENTS) as bar:
        folder = Path(temporary)
        reference = random_package(whole, teacher, folder / "teacher", cfg.quant)
        with _clock(cfg, reference, report) as (threads, speedup_of):

            def time_shape(shape: Shape) -> float:
                speedup = speedup_of(random_package(shape, teacher, folder / "student", cfg.quant, kept))
                bar.advance()
                report.note(f"{shape.layers} layers, FFN {shape.ffn}: {speedup:.2f} times the teacher's decoding rate")
                return speedup

            chosen, timed = find_shape(largest, cfg.decode_speedup, time_shape)
    (out / SHAPE).write_text(json.dumps({"layers": chosen.shape.layers, "ffn": chosen.shape.ffn}), "utf-8")
    return {
        "chosen": chosen.record(),
        "timed": [one.record() for one in timed],
        "quant": cfg.quant,
        "threads": threads,
        "target": cfg.timed_on,
    }


@contextmanager
def _clock(cfg: ShapeNode, reference: Path, report: Reporter) -> Iterator[tuple[int, Callable[[Path], float]]]:
    """Threads, and what says of a package how many times as fast as the reference it decodes, here or on a target."""
    if cfg.timed_on:
        with pace(cfg.timed_on, cfg.threads, reference, report) as there:
            yield there.threads, there.speedup_of
        return
    threads = cfg.threads or physical_cores()
    yield threads, lambda package: decode_speedup(reference, package, threads)


def _tokens(cfg: ShapeNode, teacher: Path, dataset: Artifact) -> list[int]:
    """The teacher's ids of the tokens that the student will keep."""
    rows = load_encoded(dataset.file("train.jsonl"), ChatTokenizer.from_folder(teacher), cfg.max_tokens)
    return choose_tokens(
        read_json(teacher / "tokenizer.json"), {i for row in rows for i in row.ids}, cfg.vocabulary or 0
    )


def random_package(shape: Shape, teacher: Path, folder: Path, quant: str, kept: list[int] | None = None) -> Path:
    """A GGUF of this shape with random weights and the `kept` tokens of the teacher's tokenizer, or all."""
    config = shape.into(read_config(teacher))
    if kept is not None:
        config = cut_token_ids(config, kept)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    save_model(model, folder, teacher)
    if kept is not None:
        write_json(folder / "tokenizer.json", cut_tokenizer(read_json(teacher / "tokenizer.json"), kept))
    full, package = folder / "full.gguf", folder / "model.gguf"
    write_gguf(folder, full, "f16")
    if quant == "f16":
        return full
    quantize(full, package, quant, physical_cores())
    return package
