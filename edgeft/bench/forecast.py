"""Every device beside every package: what `edgeft devices` shows, as rows and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.artifact import MANIFEST, open_artifact
from edgeft.bench.footprint import Footprint, read_footprint
from edgeft.bench.predict import calibration, predict
from edgeft.bench.predictor import Errors, load_predictor
from edgeft.bench.profiles import Profile
from edgeft.bench.runtimes import RUNTIMES, runtime_of
from edgeft.errors import ArtifactError, EdgeftError

DEVICE_HEADERS = [
    "device", "what it is", "chip", "fast cores", "RAM GB", "predicted for an app", "peak GB/s",
    "CPU level",
]  # fmt: skip
FORECAST_HEADERS = [
    "device", "package", "predicted tok/s", "predicted tok/s, 90%", "predicted TTFT ms", "predicted TTFT ms, 90%",
    "predicted MB", "predicted cache MB / 1,000 tokens", "predicted usable MB", "predicted to fit",
]  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package to predict for: a short name, its content's digest if it has one, and its footprint."""

    name: str
    path: Path
    digest: str | None
    footprint: Footprint


def open_package(path: Path) -> Package:
    """Raises ArtifactError if `path` holds no package."""
    if RUNTIMES[runtime_of(path)].format == "hf":
        raise ArtifactError(f"{path} is a model folder, no package for a device", "export it: edgeft run RECIPE")
    artifact = open_artifact(path) if (path / MANIFEST).is_file() else None
    name = str(artifact.manifest.made_by.get("node") or path.name) if artifact else path.name
    return Package(name, path, artifact.digest if artifact else None, read_footprint(path))


def device_rows(profiles: Mapping[str, Profile]) -> list[list[str]]:
    """One line per profile."""
    rows = []
    for name, p in profiles.items():
        cores = ", ".join(f"{c.count}x{c.core} {c.ghz:g}" for c in p.cpu.clusters if c.fast)
        usable = f"{p.usable_bytes / 1e9:.1f}"
        ram, peak = (f"{figure.value:g}{_mark(figure.kind)}" for figure in (p.ram_gb, p.bandwidth_gbps))
        rows.append([name, p.title, p.soc, cores + _mark(p.cpu.kind), ram, usable, peak, p.cpu.isa])
    return rows


def device_remarks(profiles: Mapping[str, Profile]) -> list[str]:
    """What a reader of the profiles must know: which figures nobody has checked, and how to see what fits."""
    figures = {name: (p.cpu, p.ram_gb, p.bandwidth_gbps) for name, p in profiles.items()}
    doubtful = [name for name, found in figures.items() if any(_mark(figure.kind) for figure in found)]
    lines = [f"? unverified, written down from general knowledge: {', '.join(doubtful)}."] if doubtful else []
    return [*lines, "What fits, and how fast it is predicted to be: edgeft devices PACKAGE"]


def _mark(kind: str) -> str:
    return "?" if kind == "unverified" else ""


def forecast(
    packages: Sequence[Package],
    profiles: Mapping[str, Profile],
    prompt_tokens: int,
    measured: str | None = None,
) -> list[dict[str, Any]]:
    """Predictions for every device and package, the fastest package of a device first.

    `measured` corrects the only profile by one run on that device: decode tokens/s of the first package, or a file of
    rows as `edgeft bench --json` prints them, one of which must be of a package given here. Raises EdgeftError.
    """
    model = load_predictor()
    scale = 1.0
    if measured is not None:
        if len(profiles) != 1:
            raise EdgeftError("one run tells about one device", "name it: --device NAME")
        [(name, profile)] = profiles.items()
        run = _measurement(measured, packages)
        threads = predict(name, profile, run.package.footprint, run.prompt_tokens, model).threads
        if run.threads not in (None, threads):
            raise EdgeftError(
                f"{measured}: measured on {run.threads} threads, where {threads} are predicted for",
                f"measure the device so: edgeft bench PACKAGE --target ... --threads {threads} --json",
            )
        scale = calibration(name, profile, run.package.footprint, run.decode_tps, model, run.prompt_tokens)
    rows = []
    for name, profile in profiles.items():
        found = [(p, predict(name, profile, p.footprint, prompt_tokens, model, scale)) for p in packages]
        for package, prediction in sorted(found, key=lambda pair: -pair[1].decode_tps):
            rows.append({"package": package.name, "path": str(package.path), **prediction.as_json()})
    return rows


def forecast_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of `forecast` as cells."""
    cells = []
    for row in rows:
        p = row["predicted"]
        bands = (
            f"{p['decode_tps_low']:.0f}-{p['decode_tps_high']:.0f}",
            f"{1000 * p['ttft_s_low']:,.0f}-{1000 * p['ttft_s_high']:,.0f}",
        )
        decode_band, ttft_band = (band if row["tested"] else f"({band})" for band in bands)
        cells.append(
            [
                row["device"],
                row["package"],
                f"{p['decode_tps']:.0f}" if p["decode_tps"] >= 20 else f"{p['decode_tps']:.1f}",
                decode_band,
                f"{1000 * p['ttft_s']:,.0f}",
                ttft_band,
                f"{p['memory_bytes'] / 1e6:,.0f}",
                f"{p['cache_bytes_per_1000'] / 1e6:,.0f}",
                f"{p['usable_bytes'] / 1e6:,.0f}",
                "yes" if p["fits"] else "no",
            ]
        )
    return cells


def remarks(rows: Sequence[dict[str, Any]], prompt_tokens: int) -> list[str]:
    """What a reader must know beside the table: where the bands come from, and where a row leaves tested ground."""
    model = load_predictor()
    lines = [
        f"Predicted, not measured: CPU, prompt of {prompt_tokens} tokens, from {model.num_rows} published runs on "
        f"{model.num_phones} phones ({model.source}).",
    ]
    texts = {
        "new_device": "devices never measured (tested by leaving out phone and model)",
        "known_device": "devices among these runs (tested by leaving out the model)",
        "calibrated": "corrected by your run (tested by leaving out phone and model)",
    }
    for basis in sorted({row["predicted"]["basis"] for row in rows}):
        errors: Errors = getattr(model, basis).decode
        names = sorted({row["device"] for row in rows if row["predicted"]["basis"] == basis})
        shown = ", ".join(names) if len(names) < 5 else f"{len(names)} devices"
        lines.append(f"{shown}: {texts[basis]}: median error {errors.median:.0%}, p90 {errors.p90:.0%}.")
    if not all(row["tested"] for row in rows):
        lines.append("A band in brackets is a guess, because the row goes beyond what was tested:")
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        names = sorted({row["device"] for row in rows if note in row["notes"]})
        packages = sorted({row["package"] for row in rows if note in row["notes"]})
        everywhere = len(names) == len({row["device"] for row in rows})
        lines.append(f"  {', '.join(packages if everywhere else names)}: {note}.")
    return lines


@dataclass(frozen=True)
class Run:
    """What one run on a device told; threads are not known of a number alone."""

    package: Package
    decode_tps: float
    prompt_tokens: int
    threads: int | None


def _measurement(measured: str, packages: Sequence[Package]) -> Run:
    """Of a number, or of a file of bench rows, which must be of one target."""
    if not Path(measured).is_file():
        try:
            return Run(packages[0], _positive(float(measured)), 128, None)
        except ValueError:
            raise EdgeftError(
                f"--calibrate {measured}: neither a file nor a number above 0",
                "give the decode tokens/s of the first package, or a file that `edgeft bench PACKAGE --json` wrote",
            ) from None
    rows = json.loads(Path(measured).read_text("utf-8"))
    known = {package.digest: package for package in packages if package.digest}
    rows = [row for row in (rows if isinstance(rows, list) else [rows]) if row.get("decode_tps")]
    rows = [row for row in rows if row.get("digest") in known]
    if not rows:
        raise EdgeftError(
            f"{measured}: no row measures one of these packages",
            "measure one of them on the device: edgeft bench PACKAGE --json",
        )
    if len(targets := sorted({str(row.get("target") or "this machine") for row in rows})) > 1:
        raise EdgeftError(
            f"{measured}: rows of several targets ({', '.join(targets)}), where one device is to be corrected",
            "measure that one alone: edgeft bench PACKAGE --target ... --json",
        )
    row, said = rows[0], rows[0]["conditions"]
    return Run(known[row["digest"]], _positive(float(row["decode_tps"])), int(said["prompt_tokens"]), said["threads"])


def _positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(value)
    return value
