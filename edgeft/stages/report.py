"""report: the run's table and its page, from what the other stages wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.artifact import LOG_DIR, Artifact
from edgeft.bench.claims import as_text, claims, key_of
from edgeft.bench.figures import Rung
from edgeft.bench.report import RunRecord, joint_hits, render
from edgeft.bench.table import in_order, name_of_input
from edgeft.plan import ReportNode
from edgeft.progress import Reporter
from edgeft.text.encode import read_rows

CURVES = ("train", "distill")  # and distill-1, distill-2, ... of a student cut in steps
BENCH, PACKAGE = "bench-", "package-"
DETAILS = "details.json"
SAMPLES = f"{LOG_DIR}/samples.jsonl"
HOST = f"{LOG_DIR}/host.json"


def run(cfg: ReportNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: train, distill (if there is a student), merge, dataset, transfer (if there is one), probe-student (if
    there is a student), bench-*, package-*.

    Writes report.html and table.json.
    """
    benches = {name: artifact for name, artifact in inputs.items() if name.startswith(BENCH)}
    rows = []
    test_rows, details, samples = {}, {}, {}
    for name, artifact in benches.items():
        row = artifact.read_json("result.json")
        row["name"] = name_of_input(name, row)
        rows.append(row)
        test_rows[key_of(row)] = read_rows(artifact.file("rows.jsonl"))
        if DETAILS in artifact.manifest.files:  # the linear classifier has none
            details[key_of(row)] = artifact.read_json(DETAILS)
        if SAMPLES in artifact.manifest.files:
            samples[key_of(row)] = read_rows(artifact.file(SAMPLES))
    rows = in_order(rows)
    page = render(
        RunRecord(
            name=cfg.name,
            rows=rows,
            curves={name: inputs[name].read_json("history.json") for name in inputs if name.startswith(CURVES)},
            merge=inputs["merge"].metrics,
            general=_general(inputs),
            dataset=_rows_found(inputs),
            host=_host(benches),
            artifacts=_artifacts(inputs, rows, benches),
            test_rows=test_rows,
            details=details,
            samples=samples,
            rungs=_rungs(inputs),
            token_price=cfg.token_price,
        )
    )
    (out / "report.html").write_text(page, "utf-8")
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return {"rows": len(rows), "claims": as_text(claims(rows, joint_hits(test_rows)))}


def _rows_found(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The data report, with the messages that the teacher answered as one split more."""
    found: dict[str, Any] = inputs["dataset"].read_json("data_report.json")
    if "transfer" in inputs:
        found["splits"] |= inputs["transfer"].read_json("data_report.json")["splits"]
    return found


def _rungs(inputs: Mapping[str, Artifact]) -> list[Rung]:
    """The ladder from the adapter as trained to the packages; steps that were not compared are left out."""
    found = []
    trained = inputs["merge"].metrics.get("from_trained")
    if trained:
        limit = {"threshold": inputs["merge"].config.get("max_kl")}
        parity = {**trained["validation"], "general": trained["general"], **limit}
        found.append(Rung("teacher, merged", "the base with its adapter, as trained", parity))
    packages = [(name.removeprefix(PACKAGE), a.metrics) for name, a in inputs.items() if name.startswith(PACKAGE)]
    rungs = [(name.partition("-")[0], Rung(name.replace("-", " "), "its torch model", m)) for name, m in packages]
    found += [rung for model, rung in rungs if model == "teacher"]
    descent = inputs["probe-student"].metrics.get("from_parent") if "probe-student" in inputs else None
    if descent:
        limit = {"threshold": inputs["probe-student"].config.get("max_kl")}
        found.append(Rung("student, healed", "the teacher", {**descent, **limit}))
    return found + [rung for model, rung in rungs if model != "teacher"]


def _general(inputs: Mapping[str, Artifact]) -> dict[str, dict[str, float]]:
    """What each model makes of general text, in the order in which they were made."""
    merged = inputs["merge"].metrics
    found = {"base": merged["general_base"], "teacher": merged["general"]}
    return found | ({"student": inputs["distill"].metrics["general"]} if "distill" in inputs else {})


def _host(benches: Mapping[str, Artifact]) -> dict[str, Any]:
    """The host of the first package; the load average over all of them, because it tells how quiet the machine was."""
    hosts = [artifact.read_json(HOST) for artifact in benches.values() if HOST in artifact.manifest.files]
    if not hosts:
        return {}
    loads = [host["load_average"][0] for host in hosts if host.get("load_average")]
    together = {key: value for key, value in hosts[0].items() if key not in ("load_average", "import_s")}
    if loads:
        together["load_average_at_start"] = f"{min(loads)} to {max(loads)} over {len(loads)} packages"
    others = sorted({str(host["cpu"]) for host in hosts[1:]} - {str(hosts[0]["cpu"])})
    if others:
        together["also_measured_on"] = others
    return together


def _artifacts(
    inputs: Mapping[str, Artifact], rows: list[dict[str, Any]], benches: Mapping[str, Artifact]
) -> list[dict[str, str]]:
    """Packages first: they are what ships."""
    folder = next((artifact.path.parent for artifact in benches.values()), Path())
    found = [
        {"name": key_of(row), "kind": "package", "digest": row["digest"], "path": str(folder / row["package"])}
        for row in rows
        if row["package"] and row["digest"]
    ]
    for name, artifact in inputs.items():
        if name.startswith(PACKAGE):
            continue  # they stand there already
        found.append({"name": name, "kind": artifact.kind, "digest": artifact.digest, "path": str(artifact.path)})
    return found
