"""Students of one teacher, trained and measured by the pipeline: sizes, and what each ingredient brings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.bench.host import physical_cores
from edgeft.bench.race import decode_speedup
from edgeft.bench.stats import bootstrap_ratio
from edgeft.pipeline import Pipeline
from edgeft.recipe import load_recipe

LABELS_ONLY = ("distill.teacher_weight=0",)
WHOLE_VOCABULARY = ("student.vocabulary=null",)
MEASURED = ("bench-teacher-gguf-q8_0", "bench-student-gguf-q8_0")
# Only what is measured is exported, however far the student is from its teacher.
LEAN = ("export.gguf=[q8_0]", "export.onnx=[]", "export.max_kl.student=100")


@dataclass(frozen=True)
class Variant:
    """A student: its name, the part of the teacher's size it aims at, and what the recipe is changed by."""

    name: str
    part: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One trained student beside its teacher, both through Q8_0 in llama.cpp on the same n rows."""

    variant: str
    part: str
    seed: int
    bytes_ratio: float
    decode_speedup: float
    n: int
    teacher_exact: float
    student_exact: float
    retention: tuple[float, float, float] | None  # with its 95% interval, paired by row; None: nothing to keep
    bytes_per_trained_token: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


def variants(layers: int, full: bool) -> Iterator[Variant]:
    """For a teacher with so many layers and an embedding of a fifth of its size, as SmolLM2-135M has."""
    small = ("student.vocabulary=8192",)
    third = (f"student.layers={round(layers * 0.36)}", *small)
    yield Variant("all ingredients", "1/3", third)
    if not full:
        return
    yield Variant("all ingredients", "1/2", (f"student.layers={round(layers * 0.57)}", *small))
    yield Variant("all ingredients", "1/4", (f"student.layers={round(layers * 0.26)}", *small))
    yield Variant(
        "depth alone, on labels", "1/3", (f"student.layers={round(layers * 0.14)}", *WHOLE_VOCABULARY, *LABELS_ONLY)
    )
    yield Variant("depth and KL", "1/3", (f"student.layers={round(layers * 0.14)}", *WHOLE_VOCABULARY))
    yield Variant("depth and vocabulary, on labels", "1/3", (*third, *LABELS_ONLY))
    yield Variant("all ingredients, in three cuts", "1/3", (*third, "student.steps=3"))


def measure(recipe: Path, runs: Path, variant: Variant, seed: int, settings: Sequence[str]) -> Result:
    """Train the student unless the run folder has it, and compare it with its teacher."""
    changes = (*settings, *LEAN, *variant.changes, f"distill.seed={seed}")
    pipeline = Pipeline(load_recipe(recipe, changes), runs)
    done = {name: artifact for stage in MEASURED for name, artifact in pipeline.run(stage).items()}
    teacher, student = (done[name].read_json("result.json") for name in MEASURED)
    right = [hits(done[name].file("rows.jsonl")) for name in MEASURED]
    files = [done[f"{model}-gguf-q8_0"].file("model.gguf") for model in ("teacher", "student")]
    return Result(
        variant=variant.name,
        part=variant.part,
        seed=seed,
        bytes_ratio=files[1].stat().st_size / files[0].stat().st_size,
        decode_speedup=decode_speedup(files[0], files[1], physical_cores()),
        n=len(right[0]),
        teacher_exact=teacher["joint_exact_match"][0],
        student_exact=student["joint_exact_match"][0],
        retention=bootstrap_ratio(right[1], right[0]) if any(right[0]) else None,
        bytes_per_trained_token=done["targets"].manifest.metrics["bytes_per_token"],
    )


def hits(rows: Path) -> list[bool]:
    """Which answers were right as a whole, in the order of the rows."""
    return [json.loads(line)["joint_correct"] for line in rows.read_text("utf-8").splitlines()]


def typical(same: Sequence[Result]) -> Result:
    """Of a variant's seeds the one in the middle, by what it kept of its teacher; of two, the lower."""
    return sorted(same, key=lambda one: one.retention or (0.0,))[(len(same) - 1) // 2]


def markdown(results: Sequence[Result]) -> str:
    """A line per variant: medians over the seeds, with the least and the most; of the seed in the middle, what it kept
    of its teacher's exact answers with the 95% interval over the rows, paired."""
    lines = [
        "| student | part | seeds | bytes | decoding | rows | teacher exact | student exact | kept (95%) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys((r.variant, r.part) for r in results):
        same = [r for r in results if (r.variant, r.part) == key]
        exact = [100 * r.student_exact for r in same]
        rate = statistics.median(r.decode_speedup for r in same)
        kept = typical(same).retention
        lines.append(
            f"| {key[0]} | {key[1]} | {len(same)} | {same[0].bytes_ratio:.3f} "
            f"| {rate:.2f} x | {same[0].n} | {100 * same[0].teacher_exact:.1f}% "
            f"| {statistics.median(exact):.1f}% ({min(exact):.1f} to {max(exact):.1f}) "
            f"| {'{:.1%} ({:.1%} to {:.1%})'.format(*kept) if kept else 'nothing to keep'} |"
        )
    return "\n".join(lines)
