"""From a recipe to a graph: which stages run, with which settings, on whose output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeft.export_settings import ExportSettings
from edgeft.learning_settings import DistillSettings, LoopPrecision, MergeSettings, Precision, StudentSettings
from edgeft.recipe import Recipe
from edgeft.settings import BaseSettings, BenchSettings, Settings, TaskSettings

BASE, DATA, ADAPTER, TEACHER = "base", "data", "train", "merge"  # nodes of every plan
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
    name: str | None = None  # what apps show of a GGUF file
    int4_blocks: tuple[int, ...] = (32,)
    tensor_types: tuple[tuple[str, str], ...] = ()  # rule, type; the first rule that fits counts
    exporter: Literal["builder", "optimum"] = "builder"
    alignment: int | None = None
    static: int | None = None
    ort: bool = False


class MergeNode(Settings):
    """What `stages/merge.py` does."""

    merge: MergeSettings = MergeSettings()
    max_kl: float
    bits: Literal[4, 8] | None = None  # of the narrowest package that is made of the result


class ShapeNode(Settings):
    """What `stages/shape.py` times."""

    decode_speedup: float
    vocabulary: int | None
    hidden: int | None
    kv_heads: int | None
    max_tokens: int
    quant: str
    threads: int | None
    timed_on: str | None


class StudentNode(Settings):
    """What `stages/student.py` cuts."""

    student: StudentSettings
    max_tokens: int
    precision: LoopPrecision
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
    max_kl: float | None = None  # from the model it was distilled from


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
    graph = _Graph(recipe)
    graph.add_teacher()
    models = {"teacher": TEACHER} | ({"student": graph.add_student()} if recipe.student else {})
    packages = graph.add_packages(models)
    graph.add_report(graph.add_benches(packages), packages)
    return graph.nodes


@dataclass
class _Graph:
    """A plan that grows; every method adds nodes to what those before it added."""

    recipe: Recipe
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(
        self, name: str, stage: str, config: Settings, inputs: dict[str, str], sources: dict[str, Path] | None = None
    ) -> str:
        self.nodes[name] = Node(name, stage, config, inputs, sources or {})
        return name

    def add_teacher(self) -> None:
        """The base model and the rows, what may fail early, and the teacher that comes of them."""
        recipe, data, student = self.recipe, self.recipe.data, self.recipe.student
        splits = {split: getattr(data, split) for split in ("train", "validation", "test", "replay")}
        self.add(BASE, "base", recipe.base, {}, _on_disk(model=recipe.base.model))
        self.add(DATA, "data", data.model_copy(update={"transfer": None}), {}, _on_disk(**splits))
        if student and student.model:  # first of all, as it may not fit the teacher
            ready = BaseSettings(model=student.model, revision=student.revision, sha256=student.sha256)
            fitting = {"teacher": BASE} if recipe.targets.kind == "tokens" else {}
            self.add("student", "base", ready, fitting, _on_disk(model=student.model))
        if student and data.transfer:
            unanswered = TransferNode(transfer=data.transfer, system=data.system)
            self.add("transfer", "transfer", unanswered, {"dataset": DATA}, _on_disk(transfer=data.transfer))
        self.add(ADAPTER, "train", recipe.train, {"model": BASE, "dataset": DATA})
        others = {f"adapter {n}": Path(other.adapter) for n, other in enumerate(recipe.merge.adapters, 1)}
        limit = recipe.export.max_kl["merged"]
        merging = MergeNode(merge=recipe.merge, max_kl=limit, bits=_fewest_bits(recipe.export))
        self.add(TEACHER, "merge", merging, {"model": BASE, "adapter": ADAPTER, "dataset": DATA}, others)

    def add_student(self) -> str:
        """Everything from the teacher to the healed student, whose node is returned."""
        recipe, student, taught = self.recipe, self.recipe.student, {"model": TEACHER, "dataset": DATA}
        assert student
        if "transfer" in self.nodes or recipe.targets.kind == "answers":
            transfer = {"transfer": "transfer"} if "transfer" in self.nodes else {}
            taught["dataset"] = self.add("answers", "answers", _answers(recipe), taught | transfer)
        cutting, healing = {"dataset": taught["dataset"]}, {"dataset": taught["dataset"]}
        if student.decode_speedup:
            timing = ShapeNode(
                decode_speedup=student.decode_speedup,
                vocabulary=student.vocabulary,
                hidden=student.hidden,
                kv_heads=student.kv_heads,
                max_tokens=recipe.distill.max_tokens,
                quant="q8_0",
                threads=recipe.bench.threads,
                timed_on=student.timed_on,
            )
            cutting["shape"] = self.add("shape", "shape", timing, {"model": TEACHER, **cutting})
        if recipe.targets.kind == "tokens":
            healing["targets"] = self.add("targets", "targets", recipe.targets, taught)
        if recipe.distill.needs_teacher:
            healing["teacher"] = TEACHER
        healed = TEACHER
        for suffix, cut, lesson in student_steps(recipe):
            raw = f"student{suffix}"
            if not student.model:
                self.add(raw, "student", cut, {"model": healed, **cutting})
            healed = self.add(f"distill{suffix}", "distill", lesson, {"model": raw, **healing})
            cutting["cut"] = raw
        return healed

    def add_packages(self, models: dict[str, str]) -> dict[str, str]:
        """All packages of the models, and of the base model the one that is measured; returns the models' packages."""
        export, packages = self.recipe.export, dict[str, str]()
        probe = ProbeNode(rows=export.probe_rows, max_tokens=self.recipe.train.max_tokens)
        for name, model in models.items():
            lineage = {"parent": TEACHER, "parent_probe": "probe-teacher"} if name == "student" else {}
            limit = export.max_kl["student"] if lineage else None
            frozen = probe.model_copy(update={"max_kl": limit})
            self.add(f"probe-{name}", "probe", frozen, {"model": model, "dataset": DATA, **lineage})
            for fmt, quants in (("gguf", export.gguf), ("onnx", export.onnx)):
                packages |= {f"{name}-{fmt}-{q}": self._add_package(name, model, fmt, q) for q in quants}
        if export.lora:
            self.add("adapter-gguf-lora", "lora", LoraNode(), {"model": BASE, "adapter": ADAPTER})
        self.add("probe-base", "probe", probe, {"model": BASE, "dataset": DATA})
        self._add_package("base", BASE, *_floor(export))
        return packages

    def _add_package(self, model_name: str, model: str, fmt: str, quant: str) -> str:
        export, inputs = self.recipe.export, {"model": model, "probe": f"probe-{model_name}"}
        rules: tuple[tuple[str, str], ...] = ()
        if quant not in UNQUANTISED:
            inputs["full"] = f"{model_name}-{fmt}-{FULL[fmt]}"
            if inputs["full"] not in self.nodes:
                self._add_package(model_name, model, fmt, FULL[fmt])
            if fmt == "gguf":
                rules = tuple(export.tensor_types.items())
            if quant not in BYTES_AND_ABOVE and export.importance == "auto":
                rows = ImportanceNode(rows=IMPORTANCE_ROWS, max_tokens=self.recipe.train.max_tokens)
                measured = {"model": model, "dataset": DATA}
                inputs["importance"] = self.add(f"importance-{model_name}", "importance", rows, measured)
        max_kl = export.max_kl[quant]  # type: ignore[index]
        blocks: dict[str, Any] = {"int4_blocks": export.int4_blocks} if quant == "int4" else {}
        config: dict[str, Any] = {"max_kl": max_kl, "max_tail": export.max_tail, "tensor_types": rules, **blocks}
        if fmt == "onnx":
            config |= _onnx_forms(export)
        elif quant in UNQUANTISED:
            config["name"] = f"{self.recipe.name}-{model_name}"
        node = ExportNode(format=fmt, quant=quant, **config)
        return self.add(f"{model_name}-{fmt}-{quant}", "export", node, inputs)

    def add_benches(self, packages: dict[str, str]) -> list[str]:
        """The measurement of each package, and of the two floors beside them."""
        recipe = self.recipe
        measure = BenchNode(bench=recipe.bench, task=recipe.task)
        benches = [
            self.add(f"bench-{name}", "bench", measure, {"package": node, "dataset": DATA})
            for name, node in packages.items()
        ]
        shots = measure.model_copy(update={"few_shot": recipe.bench.few_shot})
        form = "-".join(_floor(recipe.export))
        floor = {"package": f"base-{form}", "dataset": DATA}
        benches.append(self.add(f"bench-base_fewshot-{form}", "bench", shots, floor))
        benches.append(self.add("bench-svm", "baseline", BaselineNode(task=recipe.task), {"dataset": DATA}))
        return benches

    def add_report(self, benches: list[str], packages: dict[str, str]) -> None:
        """What people read: the curves of all training, the rows, the measurements, the ladder to the packages."""
        healings = [node.name for node in self.nodes.values() if node.stage == "distill"]
        transfer = [name for name in self.nodes if name == "transfer"]
        shown = {"train": ADAPTER, **{name: name for name in healings}, "merge": TEACHER, "dataset": DATA}
        probe = [name for name in self.nodes if name == "probe-student"]
        shown |= {name: name for name in (*transfer, *probe, *benches)}
        shown |= {f"package-{name}": node for name, node in packages.items()}
        config = ReportNode(name=self.recipe.name, token_price=self.recipe.report.token_price)
        self.add("report", "report", config, shown)


def _on_disk(**named: str | None) -> dict[str, Path]:
    """Those settings that name a file or folder."""
    return {name: Path(value) for name, value in named.items() if value and Path(value).is_absolute()}


def _onnx_forms(export: ExportSettings) -> dict[str, Any]:
    return {
        "exporter": export.exporter,
        "alignment": export.onnx_alignment,
        "static": export.onnx_static,
        "ort": export.onnx_ort,
    }


def _floor(export: ExportSettings) -> tuple[str, str]:
    """Format and type in which the untouched base is measured.

    GGUF only where the recipe exports it: a base that llama.cpp cannot compute still goes to ONNX.
    """
    if export.gguf or not export.onnx:
        return "gguf", "q8_0"
    return "onnx", "fp32" if export.exporter == "optimum" else "int8"  # optimum writes no 8 bits


def _fewest_bits(export: ExportSettings) -> Literal[4, 8] | None:
    """About how many bits the narrowest package's weights have."""
    quants = {*export.gguf, *export.onnx} - {"f32", "f16", "bf16", "fp32", "fp16"}
    return 4 if quants - {"q8_0", "int8"} else 8 if quants else None


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
