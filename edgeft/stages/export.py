"""Export: a model becomes one GGUF or ONNX package, which is then compared with the torch model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.artifact import CHECKPOINT_DIR, LOG_DIR, Artifact
from edgeft.bench.contract import check_contract
from edgeft.bench.engines import engines_of
from edgeft.bench.golden import needed_context, write_golden
from edgeft.bench.host import physical_cores
from edgeft.bench.int4 import write_best_int4
from edgeft.bench.ladder import Limits, context_for, measure
from edgeft.bench.session import open_session
from edgeft.bench.variants import check_variant
from edgeft.formats import gguf, gguf_quant, onnx, onnx_half, onnx_quant, onnx_variants
from edgeft.formats.diff import check_facts, where_they_part
from edgeft.formats.hf import count_parameters
from edgeft.formats.importance import load_importance
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.optimum import build_with_optimum
from edgeft.formats.probe import Probe
from edgeft.plan import ExportNode
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer

MODEL_FILES = ("model.gguf", onnx.GRAPH, onnx.WEIGHTS)  # what holds the weights, once


def run(cfg: ExportNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Write the package into `out`. Raises ParityError if it does not agree with the model."""
    model, probe = inputs["model"].path, Probe.load(inputs["probe"].path)
    choice = _write(cfg, inputs, out, physical_cores(), probe)
    if cfg.alignment and cfg.format == "onnx":
        onnx_variants.align_weights(out, cfg.alignment)
    figures = check(cfg, model, probe, out, report)
    _write_golden(model, out)
    package_bytes = _package_bytes(out)
    variants = _write_variants(cfg, probe, out)
    parameters = count_parameters(model)
    weights = sum((out / name).stat().st_size for name in MODEL_FILES if (out / name).is_file())
    return {
        "format": cfg.format,
        "quant": cfg.quant,
        "bytes": package_bytes,
        "variants": variants,
        "parameters": parameters,
        "bits_per_weight": weights * 8 / parameters,
        "tensor_types": gguf.tensor_types(out / "model.gguf") if cfg.format == "gguf" else None,
        "int4_choice": choice,
        **figures,
    }


def check(cfg: ExportNode, model: Path, probe: Probe, package: Path, report: Reporter) -> dict[str, Any]:
    """Compare the package in a folder with the model it was made from: prompts, what it says of itself, predictions.

    Returns the figures. Raises ParityError with the first thing that is wrong.
    """
    session = open_session(package, physical_cores(), context_for(probe))
    limits = Limits(cfg.max_kl, cfg.max_kl * cfg.max_tail)
    try:
        contract = check_contract(session, ChatTokenizer.from_folder(model), engines_of(package, model))
        check_facts(model, package)
        figures = measure(
            session, probe, limits, f"{cfg.format} {cfg.quant}", lambda: where_they_part(model, package), report
        )
    finally:
        session.close()
    return {"runtime": session.runtime, "contract": contract, **figures}


def _write_variants(cfg: ExportNode, probe: Probe, out: Path) -> dict[str, int]:
    """Write what else is asked for, compare each with the package, and return its size in bytes by file name."""
    if cfg.format != "onnx":
        return {}
    written = []
    if cfg.static:
        onnx_variants.write_static(out, cfg.static)
        written.append(onnx_variants.STATIC)
    if cfg.ort:
        onnx_variants.write_ort(out)
        written.append(onnx_variants.ORT)
    for name in written:
        check_variant(out, name, probe, physical_cores())
    return {name: (out / name).stat().st_size for name in written}


def _write_golden(model: Path, package: Path) -> None:
    chat = ChatTokenizer.from_folder(model)
    session = open_session(package, physical_cores(), needed_context(chat))
    try:
        write_golden(session, chat, package)
    finally:
        session.close()


def _write(
    cfg: ExportNode, inputs: dict[str, Artifact], out: Path, threads: int, probe: Probe
) -> list[dict[str, Any]] | None:
    """Write the package; returns what was measured of each way to store 4 bits, where there was a choice."""
    model = inputs["model"].path
    if cfg.format == "gguf" and cfg.quant in gguf.FLOATS:
        gguf.write_gguf(model, out / "model.gguf", cfg.quant, cfg.name)
    elif cfg.format == "gguf":
        _quantize_gguf(cfg, inputs, out, threads)
    elif cfg.quant == "fp32":
        _build_onnx(cfg, model, out)
    else:
        source = inputs["full"].file(onnx.GRAPH)
        onnx.copy_companions(inputs["full"].path, out)
        if cfg.quant == "int4":
            importance = load_importance(inputs["importance"].path) if "importance" in inputs else None
            return write_best_int4(source, out, cfg.int4_blocks, importance, probe, threads)
        if cfg.quant == "int8":
            onnx_quant.quantize_graph(source, out / onnx.GRAPH, Scheme(8))
        else:
            onnx_half.halve_graph(source, out / onnx.GRAPH)
    return None


def _build_onnx(cfg: ExportNode, model: Path, out: Path) -> None:
    if cfg.exporter == "optimum":
        build_with_optimum(model, out)
    else:
        onnx.build_onnx(model, out)


def _quantize_gguf(cfg: ExportNode, inputs: dict[str, Artifact], out: Path, threads: int) -> None:
    names = gguf.tensor_names(inputs["model"].path)
    importance = None
    if "importance" in inputs:
        importance = gguf_quant.rename_importance(load_importance(inputs["importance"].path), names)
    types = gguf_quant.types_by_tensor(dict(cfg.tensor_types), names.values())
    source = inputs["full"].file("model.gguf")
    gguf_quant.quantize(source, out / "model.gguf", cfg.quant, threads, importance, types)


def _package_bytes(out: Path) -> int:
    records = (out / LOG_DIR, out / CHECKPOINT_DIR)
    files = (path for path in out.rglob("*") if path.is_file() and not any(r in path.parents for r in records))
    return sum(path.stat().st_size for path in files)
