"""The scripts under benchmarks/ start; what they measure is looked at by people."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.distill import compare as distill_compare
from benchmarks.distill.students import Result
from benchmarks.speed import run as speed_run
from benchmarks.targets import drive, run
from benchmarks.training import compare
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.local import LocalDevice
from edgeft.formats.gguf import write_gguf
from tests.formats.tiny_model import write_tiny_llama


@pytest.mark.parametrize(
    "script",
    [
        "training.compare",
        "training.step_profile",
        "distill.compare",
        "targets.fit",
        "targets.run",
        "export.int4",
        "export.run",
        "speed.accuracy_rows",
        "speed.run",
    ],
)
def test_a_benchmark_says_what_it_measures(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{script}", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    assert left.value.code == 0
    assert "usage" in capsys.readouterr().out


def broken(*given: Any) -> Any:
    raise DeviceError("the runner ended by SIGILL", "build it for an older level")


def test_what_a_target_computes_is_held_against_this_machine_and_partings_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    write_gguf(write_tiny_llama(tmp_path / "model", seed=3), package / "model.gguf", "f32")
    row = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    lines = [json.dumps({"messages": row, "meta": {"target_json": text}}) for text in ("c d", "x")]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    asked = drive.ask(package, tmp_path / "test.jsonl")
    local = drive.computed("local", package, asked)
    same = drive.beside(package, local, local, asked)
    assert (same["ok"], same["n_answers"], same["answers_equal"], same["parts"]) == (True, 2, 2, [])
    assert same["kl_vs_local"] < 1e-9 and same["right"] == same["right_here"] == 0
    first, second = local["answers"]
    there = {**local, "answers": [[first[0], (first[1] + 1) % 50, *first[2:]], []], "logits_PV": -local["logits_PV"]}
    other = drive.beside(package, local, there, asked)
    assert not other["ok"] and "KL" in other["reason"] and other["answers_equal"] == 0
    assert [(p["answer"], p["token"]) for p in other["parts"]] == [(0, 1), (1, 0)]
    assert other["parts"][0]["margin"] > 0 and other["parts"][1]["margin"] is None
    assert run.went_wrong(other) and not run.went_wrong(same) and not run.went_wrong({"ok": False, **drive.ABSENT})
    monkeypatch.setattr(LocalDevice, "run", broken)
    crashed = drive.drive("local", package, None, local, asked)
    assert run.went_wrong(crashed) and "SIGILL" in crashed["reason"]
    away = drive.drive("ssh:nobody@nowhere.invalid", package, None, local, asked)
    assert not away["ok"] and not run.went_wrong(away)


def test_the_targets_last_line_holds_what_scripts_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"ok": True, "kl_vs_local": 0.001, "top1_vs_local": 1.0, "emulated": False}
    cell = {"format": "gguf", "threads": 1, "slower": 4, "load_s": 1.0, "ttft_s": 0.1234, "decode_tps": 5.55}
    monkeypatch.setattr(run, "chosen", lambda *given: run.Subject(tmp_path))
    monkeypatch.setattr(run, "browser_matrix", lambda package: [{**cell, "wasm_bytes": None}])

    def last_line(targets: dict[str, Any], code: int) -> dict[str, Any]:
        monkeypatch.setattr(run, "drive_all", lambda subject: targets)
        monkeypatch.setattr(sys, "argv", ["run"])
        assert run.main() == code
        out = capsys.readouterr().out
        assert "| gguf | 1 | 1/4 | 1.00 | 123 | 5.5 | - |" in out
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    absent = {"ok": False, **drive.ABSENT, "reason": "no phone"}
    found = last_line({"local": entry, "android": absent}, code=0)
    assert {"predictor_median_error", "predictor_p90_error", "n_phones", "n_rows"} <= set(found)
    for target in found["targets"].values():
        assert {"ok", "kl_vs_local", "top1_vs_local", "emulated"} <= set(target)
    last_line({"local": {**entry, "ok": False, "reason": "KL"}}, code=1)


def test_rates_of_two_tools_are_compared_in_turns_and_every_key_has_its_figure_or_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def side(name: str, rates: list[float]) -> speed_run.Side:
        def measure() -> speed_run.Rates:
            order.append(name)
            rate = rates[order.count(name) - 1]
            return {"prefill_tps": 10 * rate, "decode_tps": rate}

        return measure

    def tool(bench: speed_run.Bench) -> dict[str, Any]:
        ratios = bench.in_turns(("a", "b"), side("ours", [98.0, 99.0, 100.0, 50.0]), side("theirs", [100.0] * 4))
        return speed_run.named("_vs_tool", ratios)

    def breaks(bench: speed_run.Bench) -> dict[str, Any]:
        raise KeyError("rate")

    monkeypatch.setattr(speed_run, "FIGURES", {tool: ("decode_ratio_vs_tool",), breaks: ("other",)})
    monkeypatch.setattr(speed_run, "LastRun", lambda runs: None)
    monkeypatch.setattr(speed_run, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "--rounds", "2"])
    speed_run.main()
    assert order[:4] == ["ours", "theirs", "theirs", "ours"], "who begins changes"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["decode_ratio_vs_tool"] == pytest.approx(0.985) and found["decode_ratio_vs_tool_turns"] == [0.98, 0.99]
    assert found["prefill_ratio_vs_tool_loaded"] == pytest.approx(0.75)
    assert found["other"] is None and "KeyError" in found["other_reason"]
    assert "| a | b | decode | quiet | 98.5 (98.0 to 99.0) |" in (tmp_path / "table.md").read_text()


def test_a_long_comparison_that_was_cut_off_goes_on_and_other_code_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    figures = dict.fromkeys(("rows", "rows_per_cpu_s", "tokens_per_cpu_s", "rows_per_s", "peak_rss_bytes"), 2.0)
    figures |= {"val_loss": 0.5, "exact_match": 0.25, "gemm_share": 0.6}

    def by_turns(sides: Any, job: str, threads: int, turns: int, label: str) -> dict[str, Any]:
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(f"{label}, {turns} turns")
        return dict.fromkeys(sides, figures)

    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setattr(compare.base, "run", lambda *given: None)
    monkeypatch.setattr(compare, "datasets", lambda *given: iter([("a", tmp_path), ("b", tmp_path)]))
    monkeypatch.setattr(compare, "by_turns", by_turns)
    monkeypatch.setattr(sys, "argv", ["compare", "--full"])
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    stop_at = -1
    compare.main()
    assert done == [
        *("a, 240 rows, 2 threads, 3 turns", "a, 240 rows, 1 threads, 1 turns", "b, 240 rows, 2 threads, 1 turns"),
        *("b, 240 rows, 1 threads, 1 turns", "a, 1000000 rows, 2 threads, 1 turns"),
    ]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "a"
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4 + 2 * len(done)
    monkeypatch.setattr(compare, "maker", lambda folder: {"cpu": "another", "torch": "2"})
    compare.main()
    assert len(done) == 10


def test_students_are_compared_seed_by_seed_and_a_call_that_was_cut_off_trains_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = dict.fromkeys(("rows_per_cpu_s", "rows_per_s", "peak_rss_bytes", "val_loss", "exact_match"), 2.0)
    ours = {**sides, "rows_per_cpu_s": 9.0, "loss_vs_dense": 1.0}
    gkd = {"edgeft": ours, "trl": sides, "target_seconds_per_row": 0.1}
    asked: list[str] = []

    def against_gkd(runs: Path, settings: tuple[str, ...], threads: int, turns: int) -> dict[str, Any]:
        asked.append(f"{settings[0]} beside GKDTrainer, {turns} turns")
        return {**gkd, "made_by": distill_compare.maker(tmp_path)}

    def measure(recipe: Path, runs: Path, variant: Any, seed: int, settings: tuple[str, ...]) -> Result:
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(f"{settings[0]}, {variant}, seed {seed}")
        kept = (0.9, 0.95, 0.8)[seed]
        return Result(variant, "1/3", seed, 0.33, 3.0, 300, 0.9, 0.9 * kept, (kept, 0.0, 1.0), 100.0)

    monkeypatch.setattr(distill_compare, "HERE", tmp_path)
    monkeypatch.setattr(distill_compare, "sources", lambda *given: iter([("a", ("of a",)), ("b", ("of b",))]))
    monkeypatch.setattr(distill_compare, "against_gkd", against_gkd)
    monkeypatch.setattr(distill_compare, "measure", measure)
    monkeypatch.setattr(distill_compare, "variants", lambda *given: iter(["whole", "plain"]))
    monkeypatch.setattr(distill_compare, "load_recipe", lambda *given: None)
    monkeypatch.setattr(distill_compare, "read_config", lambda folder: {"num_hidden_layers": 30})
    monkeypatch.setattr(distill_compare, "Pipeline", FirstStage)
    monkeypatch.setattr(sys, "argv", ["compare", "--full"])
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        distill_compare.main()
    first = ["of a beside GKDTrainer, 3 turns", "of a, whole, seed 0", "of a, plain, seed 0", "of a, whole, seed 1"]
    assert asked == first
    assert "| whole | 1/3 | 2 |" in (tmp_path / "table.md").read_text()
    assert "| 300 | 90.0% | 83.2% (81.0 to 85.5) | 90.0% (0.0% to 100.0%) |" in (tmp_path / "table.md").read_text()
    stop_at = -1
    distill_compare.main()
    assert [one for one in asked if "GKD" in one] == [f"of {name} beside GKDTrainer, 3 turns" for name in "ab"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["data"], found["retention"], found["rows_per_s_ratio_vs_trl_gkd"]) == ("a", 0.9, 4.5)
    assert "## b" in (tmp_path / "table.md").read_text()


class FirstStage:
    """A pipeline whose base model is somewhere."""

    def __init__(self, *given: Any) -> None:
        self.path = Path("base")

    def run(self, stage: str) -> dict[str, Any]:
        return {stage: self}
