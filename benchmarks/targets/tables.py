"""The predictor's errors as a page, table.md: on phones left out of the fit, and on devices it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.targets.fit import Run, by, paced
from benchmarks.targets.published import footprint_of
from edgeft.bench.predict import predict
from edgeft.bench.predictor import Predictor
from edgeft.bench.profiles import load_profiles

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Checks:
    """A file of published rates that no fit has seen, and the length of the prompt before them."""

    path: Path
    prompt_tokens: int


BOARDS, PHONES = Checks(FOLDER / "boards.yaml", 16), Checks(FOLDER / "phones.yaml", 64)


def check_rows(checks: Checks, model: Predictor) -> list[dict[str, Any]]:
    """The published rates with what is predicted for them; prefill where it was published."""
    profiles, rows = load_profiles(), []
    for entry in yaml.safe_load(checks.path.read_text("utf-8")):
        package = footprint_of(entry["model"], entry["quant"], entry.get("head"))
        found = predict(entry["device"], profiles[entry["device"]], package, checks.prompt_tokens, model)
        inside = found.decode_tps_low <= entry["tps"] <= found.decode_tps_high
        rows.append({**entry, "predicted": found.decode_tps, "inside": inside, "predicted_prefill": found.prefill_tps})
    return rows


def error_table(runs: list[Run], fitted: dict[str, Any]) -> list[str]:
    """Markdown: errors by what was left out, by phone, by model, by type."""
    lines = ["| predicted | tokens/s of | runs | median error | p90 | measured / predicted, 90% |"]
    lines += ["| --- | --- | --: | --: | --: | --- |"]
    names = {
        "new_device": "phone and model never seen",
        "known_device": "model never seen, phone fitted",
        "calibrated": "phone and model never seen, one q4_0 run on the phone",
    }
    for basis, name in names.items():
        for part in ("decode", "prefill"):
            e = fitted[basis][part]
            band = f"{e['low']:.2f}-{e['high']:.2f}"
            lines.append(f"| {name} | {part} | {e['rows']} | {e['median']:.1%} | {e['p90']:.1%} | {band} |")
    lines += ["", "Phone and model never seen, decode:", "", "| group | runs | median error | p90 |"]
    lines += ["| --- | --: | --: | --: |"]
    for key in (lambda r: r.phone, lambda r: r.model, lambda r: r.quant):
        for name, e in by(runs, key, paced).items():
            lines.append(f"| {name} | {e['rows']} | {e['median']:.1%} | {e['p90']:.1%} |")
    return lines


def check_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| device | model | type | published tok/s | predicted tok/s | error | in the band | source |"]
    lines += ["| --- | --- | --- | --: | --: | --: | --- | --- |"]
    for r in rows:
        published = f"{r['tps']:g}" + (" (rounded)" if r.get("rounded") else "")
        off = f"{r['predicted'] / r['tps'] - 1:+.0%}"
        inside = "yes" if r["inside"] else "no"
        kind = r["quant"] + (f", head {r['head']}" if "head" in r else "") + (" (nearest)" if r.get("nearest") else "")
        lines.append(
            f"| {r['device']} | {r['model']} | {kind} | {published} | {r['predicted']:.2f} | {off} "
            f"| {inside} | {r['source']} |"
        )
    off = [abs(r["predicted"] / r["tps"] - 1) for r in rows]
    inside = sum(r["inside"] for r in rows)
    lines += ["", f"Median error {np.median(off):.0%}, largest {max(off):.0%}; {inside} of {len(rows)} in the band."]
    return lines + prefill_table([r for r in rows if "prefill_tps" in r])


def prefill_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "| device | model | type | published prompt tok/s | predicted prompt tok/s | error |"]
    lines += ["| --- | --- | --- | --: | --: | --- |"]
    for r in rows:
        off = f"{r['predicted_prefill'] / r['prefill_tps'] - 1:+.0%}"
        cells = [r["device"], r["model"], r["quant"], f"{r['prefill_tps']:g}", f"{r['predicted_prefill']:.1f}", off]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_text(runs: list[Run], fitted: dict[str, Any], model: Predictor) -> str:
    parts = [
        "# How wrong the predictions are",
        "",
        "Written by `make bench-targets DATA=phone_measurements.csv`. Errors are |predicted / measured - 1|; nothing "
        "is predicted from a fit that saw it.",
        "",
        "## Phones",
        "",
        f"{fitted['num_rows']} CPU runs of {fitted['num_models']} dense models "
        f"({fitted['smallest_weights'] / 1e9:.1f} to {fitted['largest_weights'] / 1e9:.1f} billion weights) on "
        f"{fitted['num_phones']} phones: {fitted['source']}. The rule that a device's rates follow the clock of its "
        "slowest busy core was chosen with these phones in sight; three phones are few, so a phone unlike all of them "
        "may lie outside the band.",
        "",
        *error_table(runs, fitted),
        "",
        "## A phone that the fit has not seen, with another runtime",
        "",
        "None of these went into the fit, nor was anything chosen by them. They were measured with ExecuTorch "
        "(XNNPACK and KleidiAI), while llama.cpp's speed is predicted: they tell whether the size of the figures is "
        "right. f16 stands for the published bfloat16, at whose prompts that runtime is half as fast as predicted. "
        "Left out are phones whose chip is not named, and files whose size is not.",
        "",
        *check_table(check_rows(PHONES, model)),
        "",
        "## Boards and laptops",
        "",
        "None of these went into the fit. That the two Raspberry Pis get the memory rate that tinymembench measured, "
        "and not a share of the bus's peak, was decided with these figures in sight. Band: that of a device never "
        "measured.",
        "",
        *check_table(check_rows(BOARDS, model)),
        "",
    ]
    return "\n".join(parts)
