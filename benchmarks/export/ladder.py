"""The ladder as a table: every rung of teacher, student and untouched base, beside llama.cpp's published figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.export.last_run import LastRun, Missing
from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.bench.run import time_package
from edgeft.export_settings import ExportSettings
from edgeft.plan import FULL, IMPORTANCE_ROWS, ExportNode, ImportanceNode
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings
from edgeft.stages import export, importance

ROUNDS = 3
# Mean KL on wikitext-2 of Llama-3-8B: llama.cpp's tools/perplexity/README.md
PUBLISHED = {"q8_0": 0.0014, "q6_k": 0.0055, "q5_k_m": 0.0108, "q4_k_m": 0.0313, "q4_0": 0.0719, "q2_k": 0.4451}
HEAD = (
    "| rung | mean KL | p99 KL | top-1 | general KL | MB | bits per weight | tokens/s | published KL, Llama 3 8B |"
    "\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def base_packages(run: LastRun, work: Path) -> dict[str, Artifact]:
    """The untouched base in the forms of the teacher's packages, made now where the run has none. Raises Missing."""
    inputs = {"model": run.base, "probe": run.made("probe", run.base)}
    found: dict[str, Artifact] = {}
    weighed: Artifact | None = None  # made once, if a package asks for it
    for name, teachers in run.packages().items():
        if not name.startswith("teacher-"):
            continue
        fmt, quant = teachers.config["format"], teachers.config["quant"]
        given = dict(inputs)
        if quant not in FULL.values():
            full = f"base-{fmt}-{FULL[fmt]}"
            if full not in found:
                found[full] = _made(run, work, fmt, FULL[fmt], inputs)
            given["full"] = found[full]
            if "importance" in teachers.manifest.inputs:
                weighed = weighed or _importance(run, work)
                given["importance"] = weighed
        if f"base-{fmt}-{quant}" not in found:
            found[f"base-{fmt}-{quant}"] = _made(run, work, fmt, quant, given)
    return found


def _made(run: LastRun, work: Path, fmt: str, quant: str, inputs: dict[str, Artifact]) -> Artifact:
    """One package of the base: the run's own if it has one."""
    ready = [
        a
        for a in run.all
        if a.manifest.stage == "export"
        and a.manifest.inputs.get("model") == run.base.digest
        and (a.config["format"], a.config["quant"]) == (fmt, quant)
    ]
    if ready:
        return ready[-1]
    out = work / f"base-{fmt}-{quant}"
    out.mkdir()
    limit = 10 * ExportSettings().max_kl[quant]  # type: ignore[index]  # it is measured here, not judged
    cfg = ExportNode(format=fmt, quant=quant, max_kl=limit)
    metrics = export.run(cfg, inputs, out, Reporter("export", out))
    return _finished(out, "package", cfg.model_dump(mode="json"), metrics)


def decode_rates(packages: Mapping[str, Artifact]) -> dict[str, float]:
    """Tokens per second of each: medians of ROUNDS fresh processes, the models of a type one after another."""
    settings, rates = BenchSettings(repeats=3), dict[str, list[float]]()
    for _ in range(ROUNDS):
        for name in sorted(packages, key=lambda name: (name.partition("-")[2], name)):
            rates.setdefault(name, []).append(time_package(packages[name].path, settings)["decode_tps"])
    return {name: statistics.median(found) for name, found in rates.items()}


def _importance(run: LastRun, work: Path) -> Artifact:
    out = work / "importance"
    out.mkdir()
    cfg = ImportanceNode(rows=IMPORTANCE_ROWS, max_tokens=512)
    given = {"model": run.base, "dataset": run.dataset}
    return _finished(out, "importance", {}, importance.run(cfg, given, out, Reporter("importance", out)))


def _finished(out: Path, kind: str, config: dict[str, Any], metrics: dict[str, Any]) -> Artifact:
    write_manifest(out, Manifest(kind, kind, "0" * 16, config, {}, scan_files(out), metrics))
    return open_artifact(out)


def table(run: LastRun, packages: Mapping[str, Artifact], rates: Mapping[str, float]) -> str:
    """In Markdown."""
    return "\n".join([HEAD, *_models(run), *(_rung(n, packages[n], rates[n]) for n in sorted(packages))])


def _models(run: LastRun) -> Iterator[str]:
    """The steps between models: the merge beside the adapter as trained, the student beside its teacher."""
    steps = {"trained -> merged (teacher)": run.teacher.metrics.get("from_trained")}
    if student := run.of_report("distill"):
        try:
            parity = run.made("probe", student).metrics.get("from_parent")
        except Missing:
            parity = None
        steps["teacher -> student"] = {"validation": parity, "general": parity.get("general")} if parity else None
    for name, found in steps.items():
        if found:
            task, general = found["validation"], found.get("general")
            spoken = f"{general['kl_mean']:.2g}" if general else ""
            yield f"| {name} | {task['kl_mean']:.2g} | {task['kl_p99']:.2g} | {task['top1']:.2%} | {spoken} | | | | |"


def _rung(name: str, package: Artifact, tps: float) -> str:
    m = package.metrics
    published = PUBLISHED.get(m["quant"], "") if m["format"] == "gguf" else ""
    general = m["general"]["kl_mean"] if m.get("general") else None
    return (
        f"| {name} | {m['kl_mean']:.2g} | {m['kl_p99']:.2g} | {m['top1']:.2%} | "
        f"{'' if general is None else f'{general:.2g}'} | {m['bytes'] / 1e6:.0f} | {m['bits_per_weight']:.2f} | "
        f"{tps:.0f} | {published} |"
    )
