"""Export: a model becomes one GGUF or ONNX package, which is then compared with the torch model it came from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from edgeft.artifact import CHECKPOINT_DIR, LOG_DIR, Artifact
from edgeft.bench.contract import check_contract
from edgeft.bench.engines import engines_of
from edgeft.bench.golden import needed_context, write_golden
from edgeft.bench.host import physical_cores
from edgeft.bench.int4 import write_best_int4
from edgeft.bench.session import Session, open_session
from edgeft.errors import ParityError
from edgeft.formats import gguf, onnx, onnx_half, onnx_quant
from edgeft.formats.hf import count_parameters
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.parity import Differences, Parity, differences, summarize
from edgeft.formats.probe import Probe
from edgeft.plan import ExportNode
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer

STEP_ROWS = 2  # rows decoded token by token as well
IMPORTANCE = "importance.safetensors"  # {tensor name: mean square of each input}


def run(cfg: ExportNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Write the package into `out`. Raises ParityError if it does not agree with the model."""
    threads = physical_cores()
    probe = Probe.load(inputs["probe"].path)
    choice = _write(cfg, inputs, out, threads, probe)
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    session = open_session(out, threads, context=max(*map(len, probe.rows), needed_context(chat)))
    try:
        contract = check_contract(session, chat, engines_of(out, inputs["model"].path))
        parts = _differences(session, probe, report)
        parity = summarize(parts)
        _check(f"{cfg.format} {cfg.quant}", parity, cfg.max_kl, parts)
        step_kl = _check_steps(session, probe, cfg)
        write_golden(session, chat, out)
    finally:
        session.close()
    parameters = count_parameters(inputs["model"].path)
    weights = sum(path.stat().st_size for path in out.glob("model.*"))
    return {
        "format": cfg.format,
        "quant": cfg.quant,
        "runtime": session.runtime,
        "bytes": _package_bytes(out),
        "parameters": parameters,
        "bits_per_weight": weights * 8 / parameters,
        "tensor_types": gguf.tensor_types(out / "model.gguf") if cfg.format == "gguf" else None,
        "int4_choice": choice,
        "contract": contract,
        "step_kl_mean": step_kl,
        "threshold": cfg.max_kl,
        **asdict(parity),
    }


def _write(
    cfg: ExportNode, inputs: dict[str, Artifact], out: Path, threads: int, probe: Probe
) -> list[dict[str, Any]] | None:
    """Write the package; returns what was measured of each way to store 4 bits, where there was a choice."""
    model = inputs["model"].path
    if cfg.format == "gguf" and cfg.quant == "f16":
        gguf.write_gguf(model, out / "model.gguf", "f16")
    elif cfg.format == "gguf":
        gguf.quantize(inputs["full"].file("model.gguf"), out / "model.gguf", cfg.quant, threads)
    elif cfg.quant == "fp32":
        onnx.build_onnx(model, out)
    else:
        source = inputs["full"].file(onnx.GRAPH)
        onnx.copy_companions(inputs["full"].path, out)
        if cfg.quant == "int4":
            importance = load_file(inputs["importance"].file(IMPORTANCE)) if "importance" in inputs else None
            return write_best_int4(source, out, cfg.int4_blocks, importance, probe, threads)
        if cfg.quant == "int8":
            onnx_quant.quantize_graph(source, out / onnx.GRAPH, Scheme(8))
        else:
            onnx_half.halve_graph(source, out / onnx.GRAPH)
    return None


def _differences(session: Session, probe: Probe, report: Reporter) -> list[Differences]:
    """One entry per row of the probe."""
    ends = np.cumsum([len(at) for at in probe.positions])[:-1]
    references, next_ids = np.split(probe.logits_PV, ends), np.split(probe.next_ids(), ends)
    parts: list[Differences] = []
    with report.track("comparing", len(probe.rows)) as task:
        scored = session.score(list(zip(probe.rows, probe.positions, strict=True)))
        for row, logits_PV in enumerate(scored):
            parts.append(differences(references[row], logits_PV, next_ids[row]))
            report.metric(row=row, kl_mean=float(parts[-1].kl_P.mean()))
            task.advance()
    return parts


def _check(package: str, parity: Parity, max_kl: float, parts: list[Differences]) -> None:
    if parity.kl_mean <= max_kl:
        return
    worst = int(np.argmax([part.kl_P.mean() for part in parts]))
    raise ParityError(
        f"the {package} package does not agree with the torch model: mean KL {parity.kl_mean:.4g} nats over "
        f"{parity.n_positions} positions, at most {max_kl:g} expected; top-1 agreement {parity.top1:.1%}, "
        f"worst row of the probe {worst} with {parts[worst].kl_P.mean():.4g}",
        "use a wider type, or raise export.max_kl in the recipe if the accuracy on your task is still good enough",
    )


def _check_steps(session: Session, probe: Probe, cfg: ExportNode) -> float:
    """Mean KL of decoding token by token, through the cache, against whole rows.

    Kernels for one token and for many round differently, each by as much as the package may differ from torch.
    """
    rows = list(zip(probe.rows, probe.positions, strict=True))[:STEP_ROWS]
    parts: list[Differences] = []
    for (ids, at), whole_PV in zip(rows, session.score(rows), strict=True):
        steps = [session.prefill(ids[: at[0] + 1])]
        steps += [session.step(token) for token in ids[at[0] + 1 : at[-1] + 1]]
        stepped_PV = np.stack(steps)[np.array(at) - at[0]]
        parts.append(differences(whole_PV, stepped_PV, np.array([ids[i + 1] for i in at])))
    kl_mean = summarize(parts).kl_mean
    if kl_mean > 2 * cfg.max_kl:
        raise ParityError(
            f"the {cfg.format} {cfg.quant} package predicts otherwise token by token, through its cache, than in whole "
            f"rows: mean KL {kl_mean:.4g} nats, at most {2 * cfg.max_kl:g} expected",
            "the graph or the runtime handles keys and values wrongly: export in the other format",
        )
    return kl_mean


def _package_bytes(out: Path) -> int:
    records = (out / LOG_DIR, out / CHECKPOINT_DIR)
    files = (path for path in out.rglob("*") if path.is_file() and not any(r in path.parents for r in records))
    return sum(path.stat().st_size for path in files)
