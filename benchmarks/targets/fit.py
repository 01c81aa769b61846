"""Fit the predictor on published phone runs, and measure how wrong it is on phones and models that it has not seen.

    python -m benchmarks.targets.fit phone_measurements.csv --write

The file has one run per line: device,soc,backend,threads,model,quant,pp256_tps,tg64_tps (more columns are ignored),
as in PocketPal AI's benchmark baselines, https://github.com/a-ghorbani/pocketpal-ai, e2e/baselines/benchmark.
Only the CPU's runs are used, of dense models; iq1_s is left out because edgeft does not export it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import nnls

from benchmarks.targets.published import BASE, MODELS, footprint_of
from edgeft.bench.footprint import Footprint
from edgeft.bench.predict import instructions
from edgeft.bench.predictor import PREDICTOR
from edgeft.bench.profiles import load_profiles

SOURCE = "PocketPal AI, e2e/baselines/benchmark at commit a3a4c34 (MIT licence)"
PROFILE_OF = {"samsung-s23": "galaxy-s23", "poco-x7-klee": "poco-mt6899", "poco-myron": "poco-f8-ultra"}
# Instructions per weight and token of llama.cpp's kernels built for armv8.2 with dotprod, counted by a TCG plugin under
# emulation (differences of runs with 1 and 3 tokens, repeatable to 0.01%). q5_0 is not among them: see `q5_0` below.
COUNTED = {
    "q8_0": 0.215, "q4_0": 0.277, "q4_k": 0.304, "iq4_nl": 0.340, "f16": 0.415, "q6_k": 0.581, "q2_k": 0.650,
    "q5_k": 0.678, "q3_k": 1.048,
}  # fmt: skip
# A type that no run of the training part holds, by one whose kernel is like its own.
STAND_IN = {"q5_0": "q3_k", "q5_1": "q3_k", "iq4_nl": "q4_0"}
DECODE_CONTEXT = 32  # tg64: tokens in the cache on average
WRITTEN = Path(__file__).resolve().parents[2] / "edgeft/bench" / PREDICTOR


@dataclass(frozen=True)
class Run:
    """One published run: a phone, a file, seconds per prompt token and per generated token."""

    phone: str
    model: str
    quant: str
    threads: int
    prefill_s: float
    decode_s: float
    package: Footprint
    pace: float
    bus: float  # bytes per second at the peak


def read_runs(path: Path) -> list[Run]:
    profiles, runs = load_profiles(), []
    with path.open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            if row["backend"] != "cpu" or row["model"] not in MODELS or row["quant"] not in BASE:
                continue
            profile, threads = profiles[PROFILE_OF[row["device"]]], int(row["threads"])
            runs.append(
                Run(
                    phone=PROFILE_OF[row["device"]],
                    model=row["model"],
                    quant=row["quant"],
                    threads=threads,
                    prefill_s=1 / float(row["pp256_tps"]),
                    decode_s=1 / float(row["tg64_tps"]),
                    package=footprint_of(row["model"], row["quant"]),
                    pace=profile.pace(threads),
                    bus=profile.bandwidth_gbps.value * 1e9,
                )
            )
    return runs


def least_relative_squares(columns: Any, seconds: Any) -> Any:
    """Coefficients >= 0 that minimise the squared relative error of columns @ coefficients against seconds."""
    scaled = columns / seconds[:, None]
    unit = np.linalg.norm(scaled, axis=0)
    unit[unit == 0] = 1.0
    found, _ = nnls(scaled / unit, np.ones(len(seconds)))
    return found / unit


@dataclass(frozen=True)
class Decode:
    """seconds = bytes / (b x reach) + instructions / (f x reach); reach is the pace, or 1 for a single phone."""

    per: dict[str, float]
    paced: bool

    def columns(self, runs: Sequence[Run]) -> Any:
        reach = np.array([run.pace if self.paced else 1.0 for run in runs])
        read = np.array([r.package.decode_bytes + r.package.cache_bytes_per_token * DECODE_CONTEXT for r in runs])
        work = np.array([instructions(run.package.weights, self.per) for run in runs])
        return np.stack([read / reach, work / reach], axis=1)

    def seconds(self, runs: Sequence[Run]) -> Any:
        return np.array([run.decode_s for run in runs])


@dataclass(frozen=True)
class Prefill:
    """seconds per prompt token = sum over types of weights x cycles / pace."""

    kinds: tuple[str, ...]

    def columns(self, runs: Sequence[Run]) -> Any:
        found = np.zeros((len(runs), len(self.kinds)))
        for line, run in zip(found, runs, strict=True):
            for kind, count in run.package.layers.items():
                line[self.kinds.index(kind if kind in self.kinds else STAND_IN[kind])] += count / run.pace
        return found

    def seconds(self, runs: Sequence[Run]) -> Any:
        return np.array([run.prefill_s for run in runs])


Part = Decode | Prefill
Make = Callable[[Sequence[Run]], Part]  # what there is to fit, from the training runs alone


def paced(runs: Sequence[Run]) -> Decode:
    return Decode({**COUNTED, "q5_0": q5_0(runs)}, paced=True)


def single(runs: Sequence[Run]) -> Decode:
    return Decode({**COUNTED, "q5_0": q5_0(runs)}, paced=False)


def prefill(runs: Sequence[Run]) -> Prefill:
    return Prefill(tuple(sorted({kind for run in runs for kind in run.package.layers})))


def ratios(make: Make, train: Sequence[Run], test: Sequence[Run]) -> Any:
    """measured speed / predicted speed on `test`, after a fit on `train`."""
    part = make(train)
    found = least_relative_squares(part.columns(train), part.seconds(train))
    return part.columns(test) @ found / part.seconds(test)


def held_out(runs: Sequence[Run], splits: Iterable[tuple[Any, Any]]) -> list[tuple[list[Run], list[Run]]]:
    """(train, test) of every split; a split is two conditions on runs."""
    pairs = [([r for r in runs if train(r)], [r for r in runs if test(r)]) for train, test in splits]
    return [(train, test) for train, test in pairs if train and test]


def new_phone_and_model(runs: Sequence[Run]) -> list[tuple[list[Run], list[Run]]]:
    """Every run is predicted from runs of other phones with other models."""
    cells = sorted({(run.phone, run.model) for run in runs})
    return held_out(
        runs,
        (
            (lambda r, p=p, m=m: p != r.phone and m != r.model, lambda r, p=p, m=m: (p, m) == (r.phone, r.model))
            for p, m in cells
        ),
    )


def known_phone_new_model(runs: Sequence[Run]) -> list[tuple[list[Run], list[Run]]]:
    """Every run is predicted from runs of the same phone with other models."""
    cells = sorted({(run.phone, run.model) for run in runs})
    return held_out(
        runs,
        (
            (lambda r, p=p, m=m: p == r.phone and m != r.model, lambda r, p=p, m=m: (p, m) == (r.phone, r.model))
            for p, m in cells
        ),
    )


def calibrated_ratios(make: Make, runs: Sequence[Run]) -> Any:
    """As on a new phone, but all speeds scaled by one q4_0 run's decode rate on it; tested on its other models."""
    found = []
    for train, test in new_phone_and_model(runs):
        phone, model = test[0].phone, test[0].model
        before = ratios(make, train, test)
        for one in (r for r in runs if r.phone == phone and r.model != model and r.quant == "q4_0"):
            found.append(before / ratios(paced, train, [one]))
    return np.concatenate(found)


def known_prefill_ratios(runs: Sequence[Run]) -> Any:
    """As the predictor does it: cycles from all phones, times one factor for the phone; the model is left out."""
    found = []
    for phone, model in sorted({(run.phone, run.model) for run in runs}):
        train = [run for run in runs if run.model != model]
        own = [run for run in train if run.phone == phone]
        test = [run for run in runs if (run.phone, run.model) == (phone, model)]
        found.append(ratios(prefill, train, test) / np.median(ratios(prefill, train, own)))
    return np.concatenate(found)


def errors(found: Any) -> dict[str, float | int]:
    """Median and p90 of |predicted / measured - 1|; the 90% band of measured / predicted."""
    off = np.abs(1 / found - 1)
    low, high = np.quantile(found, [0.05, 0.95])
    return {
        "median": round(float(np.median(off)), 3),
        "p90": round(float(np.quantile(off, 0.9)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "rows": len(found),
    }


def split_ratios(make: Make, splits: Sequence[tuple[list[Run], list[Run]]]) -> Any:
    return np.concatenate([ratios(make, train, test) for train, test in splits])


def q5_0(runs: Sequence[Run]) -> float:
    """Instructions per weight of q5_0 and q5_1: what fits the runs that hold them, given the rates of each phone.

    Without such runs, those of q5_k.
    """
    pairs = []
    for phone in sorted({run.phone for run in runs}):
        holders = [r for r in runs if r.phone == phone and {"q5_0", "q5_1"} & set(r.package.weights)]
        others = [r for r in runs if r.phone == phone and r not in holders]
        pairs += [(others, holders)] if holders and others else []
    if not pairs:
        return COUNTED["q5_k"]

    def off(value: float) -> float:
        def make(_: Sequence[Run]) -> Decode:
            return Decode({**COUNTED, "q5_0": value}, paced=False)

        return float(np.mean(np.log(split_ratios(make, pairs)) ** 2))

    return round(float(min(np.arange(0.3, 1.5, 0.02), key=off)), 2)


def fit(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of predictor.yaml."""
    decode, prompt = paced(runs), prefill(runs)
    rates = least_relative_squares(decode.columns(runs), decode.seconds(runs))
    cycles = least_relative_squares(prompt.columns(runs), prompt.seconds(runs))
    phones = sorted({run.phone for run in runs})
    devices = {p: device_rates([r for r in runs if r.phone == p], decode.per, prompt, cycles) for p in phones}
    shares = [devices[run.phone]["bytes_per_s"] / run.bus for run in runs]
    weights = [sum(run.package.weights.values()) for run in runs]
    new, known = new_phone_and_model(runs), known_phone_new_model(runs)
    return {
        "source": SOURCE,
        "num_phones": len(phones),
        "num_rows": len(runs),
        "num_models": len({run.model for run in runs}),
        "smallest_weights": min(weights),
        "largest_weights": max(weights),
        "instructions_per_weight": decode.per,
        "fitted": {
            "bytes_per_cycle": round(float(1 / rates[0]), 3),
            "instructions_per_cycle": round(float(1 / rates[1]), 3),
            "bandwidth_share": round(float(max(shares)), 3),
            "prefill_cycles_per_weight": {k: round(float(c), 4) for k, c in zip(prompt.kinds, cycles, strict=True)},
        },
        "devices": devices,
        "new_device": {
            "decode": errors(split_ratios(paced, new)),
            "prefill": errors(split_ratios(prefill, new)),
        },
        "known_device": {
            "decode": errors(split_ratios(single, known)),
            "prefill": errors(known_prefill_ratios(runs)),
        },
        "calibrated": {
            "decode": errors(calibrated_ratios(paced, runs)),
            "prefill": errors(calibrated_ratios(prefill, runs)),
        },
    }


def device_rates(runs: Sequence[Run], per: dict[str, float], prompt: Prefill, cycles: Any) -> dict[str, float | int]:
    """Rates of one phone, from all of its runs."""
    decode = Decode(per, paced=False)
    read, work = least_relative_squares(decode.columns(runs), decode.seconds(runs))
    quicker = np.median(prompt.columns(runs) @ cycles / prompt.seconds(runs))
    return {
        "bytes_per_s": float(f"{1 / read:.4g}"),
        "instructions_per_s": float(f"{1 / work:.4g}"),
        "prefill_speed": round(float(quicker), 3),
        "threads": runs[0].threads,
    }


def by(runs: Sequence[Run], key: Callable[[Run], str], make: Make) -> dict[str, dict[str, float | int]]:
    """Errors on new phones with new models, for each value of `key`."""
    found: dict[str, list[Any]] = {}
    for train, test in new_phone_and_model(runs):
        for run, ratio in zip(test, ratios(make, train, test), strict=True):
            found.setdefault(key(run), []).append(ratio)
    return {name: errors(np.array(values)) for name, values in sorted(found.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {PREDICTOR} in place of printing it")
    args = parser.parse_args()
    text = yaml.safe_dump(fit(read_runs(args.data)), sort_keys=False, width=110)
    header = "# Written by benchmarks/targets/fit.py; do not edit.\n"
    WRITTEN.write_text(header + text, "utf-8") if args.write else sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
