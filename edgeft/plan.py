"""From a recipe to a graph: which stages run, with which settings, on whose output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgeft.recipe import (
    BaseSettings,
    BenchSettings,
    DistillSettings,
    Precision,
    Recipe,
    Settings,
    StudentSettings,
    TaskSettings,
)

FULL = {"gguf": "f16", "onnx": "fp32"}  # what quantised packages of a format are made from
UNQUANTISED = ("f32", "f16", "bf16", "fp32")  # written from the model itself
BYTES_AND_ABOVE = (*UNQUANTISED, "q8_0", "fp16", "int8")  # types so exact that knowing what matters does not help them
IMPORTANCE_ROWS = 128  # training rows that say which channels matter; three quarters of the gain come from the first 32


class ExportNode(Settings):
    """One package: what `stages/export.py` writes."""

    format: str
    quant: str
    max_kl: float
    max_tail: float = 10.0
    int4_blocks: tuple[int, ...] = (32,)
    tensor_types: tuple[tuple[str, str], ...] = ()  # rule, type; the first rule that fits counts


class ShapeNode(Settings):
    """What `stages/shape.py` times."""

    decode_speedup: float
    vocabulary: int | None
    quant: str
    threads: int | None


class StudentNode(Settings):
    """What `stages/student.py` cuts."""

    student: StudentSettings
    max_tokens: int
    precision: Precision
    steps_left: int = 1  # cuts until the shape is reached, this one included


class TransferNode(Settings):
    """What `stages/transfer.py` reads."""

    transfer: str
    system: str | None


class AnswersNode(Settings):
    """What `stages/answers.py` has the teacher answer: its own training prompts too, or a transfer set alone."""

    own: bool
    keep: Literal["all", "agreeing"]
    shard_rows: int
    max_tokens: int
    precision: Precision


class ProbeNode(Settings):
    """What `stages/probe.py` computes."""

    rows: int
    max_tokens: int


class ImportanceNode(Settings):
    """What `stages/importance.py` measures."""

    rows: int
    max_tokens: int
    seed: int = 0


class LoraNode(Settings):
    """`stages/lora.py` has nothing to choose."""


class BenchNode(Settings):
    """What `stages/bench.py` measures on one package."""

    bench: BenchSettings
    task: TaskSettings
    few_shot: int = 0


class BaselineNode(Settings):
    """What `stages/baseline.py` fits."""

    task: TaskSettings


class ReportNode(Settings):
    """What `stages/report.py` shows."""

    name: str
    token_price: float | None = None


@dataclass(frozen=True)
class Node:
    """One stage of one run: its settings and the nodes it reads, by the name the stage knows them by."""

    name: str
    stage: str
    config: Settings
    inputs: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)  # files outside runs/ that settings name


def plan(recipe: Recipe) -> dict[str, Node]:
    """All nodes of a recipe, in an order in which every input comes first."""
    nodes: dict[str, Node] = {}

    def add(
        name: str, stage: str, config: Settings, inputs: dict[str, str], sources: dict[str, Path] | None = None
    ) -> str:
        nodes[name] = Node(name, stage, config, inputs, sources or {})
        return name

    def importance(model_name: str, model: str) -> str:
        rows = ImportanceNode(rows=IMPORTANCE_ROWS, max_tokens=recipe.train.max_tokens)
        return add(f"importance-{model_name}", "importance", rows, {"model": model, "dataset": data})

    def package(model_name: str, model: str, fmt: str, quant: str) -> str:
        inputs = {"model": model, "probe": f"probe-{model_name}"}
        rules: tuple[tuple[str, str], ...] = ()
        if quant not in UNQUANTISED:
            inputs["full"] = f"{model_name}-{fmt}-{FULL[fmt]}"
            if inputs["full"] not in nodes:
                package(model_name, model, fmt, FULL[fmt])
            if fmt == "gguf":
                rules = tuple(recipe.export.tensor_types.items())
            if quant not in BYTES_AND_ABOVE and recipe.export.importance == "auto":
                inputs["importance"] = importance(model_name, model)
        max_kl = recipe.export.max_kl[quant]  # type: ignore[index]
        blocks = {"int4_blocks": recipe.export.int4_blocks} if quant == "int4" else {}
        config = ExportNode(
            format=fmt, quant=quant, max_kl=max_kl, max_tail=recipe.export.max_tail, tensor_types=rules, **blocks
        )
        return add(f"{model_name}-{fmt}-{quant}", "export", config, inputs)

    data_sources = {
        split: Path(value)
        for split in ("train", "validation", "test", "replay")
        if (value := getattr(recipe.data, split)) and Path(value).is_absolute()
    }
    base = add("base", "base", recipe.base, {}, _on_disk(model=recipe.base.model))
    data = add("data", "data", recipe.data.model_copy(update={"transfer": None}), {}, data_sources)
    student = recipe.student
    if student and student.model:  # first of all, as it may not fit the teacher
        ready = BaseSettings(model=student.model, revision=student.revision, sha256=student.sha256)
        fitting = {"teacher": base} if recipe.targets.kind == "tokens" else {}
        add("student", "base", ready, fitting, _on_disk(model=student.model))
    if student and recipe.data.transfer:
        unanswered = TransferNode(transfer=recipe.data.transfer, system=recipe.data.system)
        add("transfer", "transfer", unanswered, {"dataset": data}, _on_disk(transfer=recipe.data.transfer))
    adapter = add("train", "train", recipe.train, {"model": base, "dataset": data})
    teacher = add("merge", "merge", recipe.merge, {"model": base, "adapter": adapter, "dataset": data})
    models = {"teacher": teacher}
    if student:
        taught = {"model": teacher, "dataset": data}
        if "transfer" in nodes or recipe.targets.kind == "answers":
            transfer = {"transfer": "transfer"} if "transfer" in nodes else {}
            taught["dataset"] = add("answers", "answers", _answers(recipe), taught | transfer)
        cutting, healing = {"dataset": taught["dataset"]}, {"dataset": taught["dataset"]}
        if student.decode_speedup:
            timing = ShapeNode(
                decode_speedup=student.decode_speedup,
                vocabulary=student.vocabulary,
                quant="q8_0",
                threads=recipe.bench.threads,
            )
            cutting["shape"] = add("shape", "shape", timing, {"model": teacher})
        if recipe.targets.kind == "tokens":
            healing["targets"] = add("targets", "targets", recipe.targets, taught)
        if recipe.distill.needs_teacher:
            healing["teacher"] = teacher
        models["student"] = teacher
        for suffix, cut, lesson in student_steps(recipe):
            raw = f"student{suffix}"
            if not student.model:
                add(raw, "student", cut, {"model": models["student"], **cutting})
            models["student"] = add(f"distill{suffix}", "distill", lesson, {"model": raw, **healing})
            cutting["cut"] = raw

    probe = ProbeNode(rows=recipe.export.probe_rows, max_tokens=recipe.train.max_tokens)
    packages: dict[str, str] = {}
    for name, model in models.items():
        lineage = {"parent": teacher, "parent_probe": "probe-teacher"} if name == "student" else {}
        add(f"probe-{name}", "probe", probe, {"model": model, "dataset": data, **lineage})
        for fmt, quants in (("gguf", recipe.export.gguf), ("onnx", recipe.export.onnx)):
            packages |= {f"{name}-{fmt}-{q}": package(name, model, fmt, q) for q in quants}
    if recipe.export.lora:
        add("adapter-gguf-lora", "lora", LoraNode(), {"model": base, "adapter": adapter})
    add("probe-base", "probe", probe, {"model": base, "dataset": data})
    floor = package("base", base, "gguf", "q8_0")

    measure = BenchNode(bench=recipe.bench, task=recipe.task)
    benches = [
        add(f"bench-{name}", "bench", measure, {"package": node, "dataset": data}) for name, node in packages.items()
    ]
    shots = measure.model_copy(update={"few_shot": recipe.bench.few_shot})
    benches.append(add("bench-base_fewshot-gguf-q8_0", "bench", shots, {"package": floor, "dataset": data}))
    benches.append(add("bench-svm", "baseline", BaselineNode(task=recipe.task), {"dataset": data}))
    curves = {"train": adapter} | {node.name: node.name for node in nodes.values() if node.stage == "distill"}
    shown = {
        **curves,
        "merge": teacher,
        "dataset": data,
        **{name: name for name in nodes if name == "transfer"},
        **{bench: bench for bench in benches},
    }
    add("report", "report", ReportNode(name=recipe.name, token_price=recipe.report.token_price), shown)
    return nodes


def _on_disk(**named: str) -> dict[str, Path]:
    """Those settings that name a file or folder."""
    return {name: Path(value) for name, value in named.items() if Path(value).is_absolute()}


def _answers(recipe: Recipe) -> AnswersNode:
    targets = recipe.targets
    return AnswersNode(
        own=targets.kind == "answers",
        keep=targets.keep,
        shard_rows=targets.shard_rows,
        max_tokens=targets.max_tokens,
        precision=targets.precision,
    )


def student_steps(recipe: Recipe) -> Iterator[tuple[str, StudentNode, DistillSettings]]:
    """Each cut with its healing and what their nodes' names end in; the last one's in nothing.

    The healings share the epochs and evaluations equally, each with a seed and so an order of rows of its own. The
    vocabulary is cut first, so that all that follows is cheaper.
    """
    student, distill = recipe.student, recipe.distill
    if not student:
        return
    for left in range(student.steps, 0, -1):
        cut = StudentNode(
            student=student if left == student.steps else student.model_copy(update={"vocabulary": None}),
            max_tokens=distill.max_tokens,
            precision=distill.precision,
            steps_left=left,
        )
        shared = {
            "epochs": distill.epochs / student.steps,
            "evaluations": math.ceil(distill.evaluations / student.steps),
            "seed": distill.seed + left - 1,
        }
        yield "" if left == 1 else f"-{student.steps - left + 1}", cut, distill.model_copy(update=shared)
