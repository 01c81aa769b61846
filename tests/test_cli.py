"""The command line: what it prints where, its exit codes, and how fast it answers."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeft import __version__, cli, commands, naming
from edgeft.artifact import open_artifact
from tests import fakes
from tests.formats.tiny_gguf import write_gguf

ROOT = Path(__file__).resolve().parent.parent
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_stages: list[str]) -> Path:
    """An empty working directory with recipes/fake.yaml over the fake stages."""
    (tmp_path / "recipes").mkdir()
    fakes.write_recipe(tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edgeft(*args: str) -> int:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def cpu_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_in_half_a_second() -> None:
    assert min(cpu_seconds(sys.executable, "-m", "edgeft", "--help") for _ in range(3)) < 0.5


def test_version_is_printed(capsys: Captured) -> None:
    assert edgeft("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_run_ends_with_the_table_and_the_paths(desk: Path, capsys: Captured) -> None:
    assert edgeft("run", "fake") == 0
    out, err = capsys.readouterr()
    assert "student" in out and "gguf q8_0" in out
    assert "packages\n  student gguf q8_0: runs/chain-" in out
    report = out.split("report: ")[1].strip()
    assert (desk / report).name == "report.html" and (desk / report).is_file()
    assert "[3/4] chain" in err and "\x1b[" not in out + err


def test_the_table_is_not_cut_when_it_is_piped(desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    edgeft("run", "fake")
    assert "…" not in capsys.readouterr().out


def test_run_to_a_stage_prints_where_it_is(desk: Path, capsys: Captured) -> None:
    assert edgeft("run", "fake", "--to", "shout") == 0
    assert capsys.readouterr().out.startswith("shout: runs/shout-")


def test_set_changes_a_setting(desk: Path) -> None:
    assert edgeft("run", "recipes/fake.yaml", "--set", "targets.top_k=2", "--set", "task.label=x", "--to", "chain") == 0
    made = open_artifact(next((desk / "runs").glob("chain-*[0-9a-f]")))
    assert made.config == {"steps": 2}


def test_runs_may_lie_elsewhere(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_RUNS", str(desk / "elsewhere"))
    assert edgeft("run", "fake", "--to", "words") == 0
    assert list((desk / "elsewhere").glob("words-*")) and not (desk / "runs").exists()


def test_a_dry_run_shows_the_plan_and_does_nothing(desk: Path, capsys: Captured, fake_stages: list[str]) -> None:
    assert edgeft("run", "fake", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line and line[0].isalpha()] == [
        "stage",
        "words",
        "shout",
        "chain",
        "report",
    ]
    assert "named when its inputs are finished" in lines[-1]
    assert fake_stages == [] and not (desk / "runs").exists()


def test_a_dry_run_tells_done_from_resumable(desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "2")
    with pytest.raises(RuntimeError):
        cli.main(["run", "fake"])
    capsys.readouterr()
    edgeft("run", "fake", "--dry-run")
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "done" in states["shout"] and "resumes from its checkpoint" in states["chain"]


def test_show_json_is_the_table_for_scripts(desk: Path, capsys: Captured) -> None:
    edgeft("run", "fake")
    capsys.readouterr()
    assert edgeft("show", "fake", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 and rows[0]["name"] == "student" and rows[0]["kl_mean"] is None
    assert rows[0]["absent"]["kl_mean"] == "not measured"
    assert open_artifact(Path(rows[0]["path"])).digest == rows[0]["digest"]


def test_show_of_an_unfinished_run_says_how_far_it_is(desk: Path, capsys: Captured) -> None:
    edgeft("run", "fake", "--to", "shout")
    assert edgeft("show", "fake") == 2
    assert "not finished: 2 of 4 stages are done" in capsys.readouterr().err


def test_show_of_an_artifact_gives_its_manifest(desk: Path, capsys: Captured) -> None:
    edgeft("run", "fake")
    folder = next((desk / "runs").glob("shout-*[0-9a-f]"))
    capsys.readouterr()
    assert edgeft("show", str(folder), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "model" and facts["digest"] == open_artifact(folder).digest
    assert edgeft("show", folder.name) == 0  # its name below runs/ is enough
    assert "kind: model" in capsys.readouterr().out


def test_verify_passes_on_intact_files_and_fails_on_damaged_ones(desk: Path, capsys: Captured) -> None:
    edgeft("run", "fake")
    folder = next((desk / "runs").glob("chain-*[0-9a-f]"))
    assert edgeft("show", "fake", "--verify") == 0
    assert "4 artifacts: every file matches" in capsys.readouterr().out
    (folder / "value.txt").write_text("0" * 64)
    assert edgeft("show", "fake", "--verify") == 2
    assert "value.txt: sha256" in capsys.readouterr().err
    assert edgeft("show", str(folder), "--verify") == 2


def test_verify_of_nothing_is_no_success(desk: Path, capsys: Captured) -> None:
    assert edgeft("show", "fake", "--verify") == 2
    assert "nothing is finished yet" in capsys.readouterr().err


def test_ls_lists_finished_unfinished_and_damaged(
    desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "2")
    with pytest.raises(RuntimeError):
        cli.main(["run", "fake"])
    (next((desk / "runs").glob("words-*[0-9a-f]")) / "manifest.json").write_text("{")
    capsys.readouterr()
    assert edgeft("ls") == 0
    out = capsys.readouterr().out
    kinds = {line.split("-")[0]: line for line in out.splitlines() if "-" in line and "─" not in line}
    assert "damaged" in kinds["words"] and " model " in kinds["shout"] and "unfinished, resumes" in kinds["chain"]
    assert ".lock" not in out


def test_ls_without_any_run_is_an_empty_list(desk: Path) -> None:
    assert edgeft("ls") == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "nothing"], "recipes/nothing.yaml: no such recipe"),
        (["run", "fake", "--set", "targets.top_k"], "expected section.key=value"),
        (["run", "fake", "--set", "targets.top_q=3"], "did you mean 'top_k'"),
        (["run", "fake", "--to", "merge"], "--to merge: no such stage"),
        (["run", "fake", "--set", "data.train=gone.txt"], "gone.txt: no such file"),
        (["show", "nothing"], "no such recipe"),
        (["show", "recipes", "--json"], "no finished artifact"),
        (["chat", "nothing"], "nothing"),
        (["bench", "recipes"], "no finished artifact"),
        (["rum"], "Did you mean 'run'"),
        (["run"], "RECIPE"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(desk: Path, capsys: Captured, args: list[str], said: str) -> None:
    assert edgeft(*args) == 2
    out, err = capsys.readouterr()
    assert said in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(("layers", "code"), [(2, 0), (3, 2)])
def test_validate_counts_rows_and_checks_the_base_and_the_students_shape(
    desk: Path, capsys: Captured, layers: int, code: int
) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (desk / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    write_gguf(desk / "model.gguf")
    sets = [f"data.{split}=rows.jsonl" for split in ("train", "validation", "test")]
    sets += ["base.model=model.gguf", f"student.layers={layers}", "student.ffn=32"]
    flags = [part for text in sets for part in ("--set", text)]
    assert edgeft("validate", "fake", *flags) == code
    out, err = capsys.readouterr()
    if code:
        assert "student.layers is 3; the model it is cut from has 2" in err
    else:
        assert "data.train: 3 rows" in out and "no problem found" in out
        assert "student: layers 2, kv_heads 2, ffn 32, hidden 32" in out


def test_validate_looks_at_a_ready_made_student_and_at_a_transfer_set_too(desk: Path, capsys: Captured) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (desk / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (desk / "more.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    (desk / "model.gguf").write_bytes(b"GGUF")
    sets = [f"data.{split}=rows.jsonl" for split in ("train", "validation", "test")] + ["base.model=model.gguf"]
    sets += ["data.transfer=more.jsonl", "student={model: missing.gguf}"]
    flags = [part for text in sets for part in ("--set", text)]
    assert edgeft("validate", "fake", *flags) == 2
    err = capsys.readouterr().err
    assert "more.jsonl:2: none of messages, text" in err and "missing.gguf: no such file" in err
    (desk / "more.jsonl").write_text('{"text": "a"}\n')
    (desk / "missing.gguf").write_bytes(b"GGUF")
    assert edgeft("validate", "fake", *flags) == 0
    out = capsys.readouterr().out
    assert "data.transfer: 1 rows" in out and f"student.model: {desk / 'missing.gguf'}" in out


def test_validate_shows_problems_of_rows_and_base_together(desk: Path, capsys: Captured) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (desk / "rows.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    (desk / "model.gguf").write_bytes(b"GGUF")
    sets = [f"data.{split}=rows.jsonl" for split in ("train", "validation", "test")]
    sets += ["base.model=model.gguf", f"base.sha256={'f' * 64}"]
    flags = [part for text in sets for part in ("--set", text)]
    assert edgeft("validate", "fake", *flags) == 2
    err = capsys.readouterr().err
    assert "rows.jsonl:2" in err and "sha256 is" in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("IoError(Os { code: 28, kind: StorageFull, message: ... })"),
    ],
)
def test_a_full_disk_is_said_and_leaves_earlier_artifacts_untouched(
    desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["fake_stage_chain"], "run", full)
    assert edgeft("run", "fake") == 2
    err = capsys.readouterr().err
    assert "the disk of runs is full" in err and "finished stages and checkpoints are kept" in err
    assert not list((desk / "runs").glob("chain-*[0-9a-f]/manifest.json"))
    assert edgeft("show", "fake", "--verify") == 0


def test_a_really_full_disk_is_said(desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def full(cfg: object, inputs: object, out: Path, report: object) -> None:
        (out / "model.bin").symlink_to("/dev/full")
        (out / "model.bin").write_bytes(b"weights")

    monkeypatch.setattr(sys.modules["fake_stage_chain"], "run", full)
    assert edgeft("run", "fake") == 2
    assert "is full" in capsys.readouterr().err


def test_a_library_that_fails_on_a_disk_without_space_is_explained(
    desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("file write failed")

    monkeypatch.setattr(sys.modules["fake_stage_chain"], "run", fail)
    monkeypatch.setattr(commands.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert edgeft("run", "fake") == 2
    assert "file write failed" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "0")
    with pytest.raises(RuntimeError, match="on purpose"):
        cli.main(["run", "fake"])


def test_a_missing_permission_is_said(desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    monkeypatch.setattr(sys.modules["fake_stage_words"], "run", refuse)
    assert edgeft("run", "fake") == 2
    assert "no permission: /somewhere" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_says_how_to_go_on(desk: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.fakes",
        "run",
        str(desk / "recipes/fake.yaml"),
        "--runs",
        str(desk / "runs"),
    ]
    env = {**os.environ, "FAKE_STEP_S": "30"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "chain" not in (line := process.stderr.readline()):
        assert line, "ended too early"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "run the same command to go on" in said and "Traceback" not in said


def test_schema_is_printed_and_written(desk: Path, capsys: Captured) -> None:
    assert edgeft("schema") == 0
    printed = capsys.readouterr().out
    assert edgeft("schema", "--write") == 0
    assert (desk / "recipes" / "schema.json").read_text() == printed
    assert "epochs" in printed


class EchoSession:
    """Answers with the number of turns and the last text; a token is a character."""

    runtime, vocab_size, stop_ids = "echo", 256, frozenset({0})

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []

    def reset(self) -> None:
        self._left: list[int] = []

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        self.seen.append(messages)
        return [len(m["content"]) for m in messages]

    def prefill(self, ids: list[int]) -> object:
        self._left = [*f"{len(ids)} {self.seen[-1][-1]['content']}".encode(), 0]
        return self.step(0)

    def step(self, token: int) -> object:
        token = self._left.pop(0) if self._left else 0
        return type("Logits", (), {"argmax": lambda self: token})()

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *args: str, package: str = "package") -> EchoSession:
    session = EchoSession()
    monkeypatch.setattr("edgeft.bench.session.open_session", lambda *_: session)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert edgeft("chat", package, *args) == 0
    return session


def test_chat_answers_piped_lines_and_keeps_the_conversation(
    desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = chat(monkeypatch, "hé\n\nagain\n", "--system", "Be kind.")
    assert capsys.readouterr().out == "2 hé\n4 again\n"
    assert [m["role"] for m in session.seen[-1]] == ["system", "user", "assistant", "user"]
    assert session.seen[-1][2]["content"] == "2 hé"


def test_chat_forgets_on_reset_and_ends_on_quit(desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    chat(monkeypatch, "one\n/reset\ntwo\n/quit\nthree\n")
    assert capsys.readouterr().out == "1 one\n1 two\n"


def test_chat_says_when_the_conversation_no_longer_fits(
    desk: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(monkeypatch, "one\n", "--max-new-tokens", "2048")
    assert "/reset starts a new one" in capsys.readouterr().err


def test_chat_finds_the_system_message_a_package_was_trained_with(
    desk: Path, fake_stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edgeft("run", "fake")
    assert naming.system_message(next((desk / "runs").glob("chain-*[0-9a-f]"))) is None
    edgeft("run", "fake", "--set", "data.system=Be brief.", "--runs", "other")
    package = next((desk / "other").glob("chain-*[0-9a-f]"))
    assert naming.system_message(package) == "Be brief."
    session = chat(monkeypatch, "hi\n", package=str(package))
    assert session.seen[0][0] == {"role": "system", "content": "Be brief."}
