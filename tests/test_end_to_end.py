"""A tiny random model through the real stages and runtimes: data in, report out; killed, resumed, and told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.artifact import Artifact, open_artifact, verify
from tests.text.tiny import tiny_tokenizer, write_tokenizer

ROOT = Path(__file__).parent.parent
INTENTS = ("open", "close", "track")
VOCAB = 262  # 256 bytes, three special tokens, three merged pairs, of which the rows need two


def write_rows(path: Path, start: int, count: int) -> None:
    with path.open("w") as f:
        for i in range(start, start + count):
            intent = INTENTS[i % 3]
            answer = json.dumps({"intent": intent, "entities": {"id": str(i)}}) + f"\nok {i}"
            word = "abcdefghij"[i % 10] + "klmnopqrst"[i // 10 % 10] + "uvwxyz"[i // 100]
            messages = [{"role": "user", "content": f"{intent} {word} {i}"}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages, "meta": {"entities": {"id": str(i)}}}) + "\n")


def byte_tokenizer_with_merges() -> Tokenizer:
    """llama.cpp refuses a vocabulary without merges."""
    raw = json.loads(tiny_tokenizer().to_str())
    raw["model"]["vocab"] |= {"zq": 259, "ok": 260, "en": 261}
    raw["model"]["merges"] = [["z", "q"], ["o", "k"], ["e", "n"]]
    return Tokenizer.from_str(json.dumps(raw))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over a tiny random Llama with a byte tokenizer and 60 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config.num_hidden_layers, config.vocab_size = 2, VOCAB + 10
    LlamaForCausalLM(config).save_pretrained(folder / "small")  # padded, as published models are
    write_tokenizer(folder / "small", tokenizer=byte_tokenizer_with_merges())
    LlamaForCausalLM(config).save_pretrained(folder / "foreign")
    write_tokenizer(folder / "foreign", tokenizer=tiny_tokenizer())
    write_tokenizer(folder / "model", tokenizer=byte_tokenizer_with_merges())
    for split, start, count in (("train", 0, 60), ("validation", 100, 16), ("test", 200, 12)):
        write_rows(folder / f"{split}.jsonl", start, count)
    with (folder / "transfer.jsonl").open("w") as f:
        f.writelines(json.dumps({"text": f"{INTENTS[n % 3]} it, {n} please"}) + "\n" for n in range(9))
        f.write(json.dumps({"text": "track akw 200"}) + "\n")  # a test row
    (folder / "replay.txt").write_text("\n\n".join(f"Paragraph {n} of a general text." for n in range(30)))
    loop = {"epochs": 2, "batch_rows": 8, "evaluations": 2, "checkpoint_minutes": 0, "precision": "fp32"}
    settings = {
        "name": "tiny",
        "base": {"model": "./model"},
        "data": {split: f"{split}.jsonl" for split in ("train", "validation", "test")} | {"replay": "replay.txt"},
        "train": {**loop, "lr": 0.01, "rank": 4},
        "student": {"layers": 2, "vocabulary": VOCAB - 1},
        "targets": {"top_k": 8, "shard_rows": 20, "precision": "fp32"},
        "distill": {**loop, "lr": 0.003},
        "export": {"gguf": ["f16"], "onnx": ["fp32"], "probe_rows": 8},
        "bench": {
            "threads": 1,
            "prompt_tokens": 16,
            "decode_tokens": 4,
            "repeats": 3,
            "max_new_tokens": 8,
            "few_shot": 2,
        },  # fmt: skip
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(recipe: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "edgeft", "run", str(recipe), "--runs", str(runs), *more]


def edgeft(recipe: Path, runs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, runs, *more), cwd=ROOT, capture_output=True, text=True, timeout=280)


def artifact(runs: Path, stage: str) -> Artifact:
    (folder,) = runs.glob(f"{stage}-*[0-9a-f]")
    return open_artifact(folder)


def kill_during(stage: str, recipe: Path, runs: Path, *more: str) -> None:
    """Start the run and kill -9 it as soon as `stage` has done three steps."""
    process = subprocess.Popen(
        command(recipe, runs, *more), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = [p.read_text().count("\n") for p in runs.glob(f"{stage}-*.partial/log/metrics.jsonl")]
        if lines and lines[0] >= 3:
            break
        assert process.poll() is None, f"the run ended before {stage} could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(runs.glob(f"{stage}-*/manifest.json"))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_killed_training_and_distilling_end_in_the_same_bits_as_an_unbroken_run(
    recipe: Path, tmp_path: Path, precision: str
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    sets = [f"distill.{kind}_weight=0.1" for kind in ("hidden", "attention")]  # projections learn beside the student
    sets += [f"{stage}.precision={precision}" for stage in ("train", "distill")]
    settings = ["--to", "distill", *(part for text in sets for part in ("--set", text))]
    done = edgeft(recipe, unbroken, *settings)
    assert done.returncode == 0, done.stderr
    for stage in ("train", "distill"):
        kill_during(stage, recipe, broken, *settings)
    done = edgeft(recipe, broken, *settings)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout + done.stderr
    for stage in ("train", "merge", "distill"):
        assert artifact(broken, stage).digest == artifact(unbroken, stage).digest, stage
    assert artifact(broken, "train").metrics["int8_products"] is (precision == "int8")


def test_two_processes_learn_what_one_does(recipe: Path, tmp_path: Path) -> None:
    """Under `accelerate launch` each batch is shared; sums in another order differ in the last digits only.

    At a rate at which rounding errors do not grow: at the recipe's own, some seeds multiply them by 200 in a step.
    """
    one, two, calm = tmp_path / "one", tmp_path / "two", ["--set", "train.lr=0.003"]
    assert edgeft(recipe, one, "--to", "train", *calm).returncode == 0
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                "--main_process_port", "0", "-m", "edgeft"]  # fmt: skip
    arguments = command(recipe, two, "--to", "train", *calm)[3:]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    histories = [artifact(runs, "train").read_json("history.json") for runs in (one, two)]
    for kind in ("steps", "evals"):
        losses = [[entry["loss"] for entry in history[kind]] for history in histories]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    rates = [artifact(runs, "train").path / "log" / "metrics.jsonl" for runs in (one, two)]
    tokens = [[json.loads(line).get("tokens") for line in path.open()][0] for path in rates]
    assert tokens[1] < 0.7 * tokens[0]  # the first process did half of the rows, not all of them


def test_a_range_test_suggests_a_rate_and_keeps_nothing(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "lr-find", str(recipe), "--runs", str(tmp_path), "--steps", "8", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["points"]) <= 8 and found["points"][0]["lr"] == pytest.approx(1e-5)
    assert 1e-6 < found["suggested_lr"] < 3e-2
    assert not list(tmp_path.glob("train-*"))


def test_a_whole_run_ends_in_a_table_and_a_report_and_costs_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    width = {"steps": 2, "layers": 3, "ffn": 64, "hidden": 32, "kv_heads": 1}  # two steps in all widths
    narrow = [part for name, value in width.items() for part in ("--set", f"student.{name}={value}")]
    done = edgeft(recipe, tmp_path, *narrow)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    report = artifact(tmp_path, "report")
    assert {"distill-1", "distill"} <= report.manifest.inputs.keys()
    shapes = {}
    for folder in tmp_path.glob("distill-*[0-9a-f]"):
        config = open_artifact(folder).read_json("config.json")
        names = ("num_hidden_layers", "intermediate_size", "hidden_size", "num_key_value_heads", "vocab_size")
        shapes[open_artifact(folder).manifest.made_by["node"]] = tuple(config[name] for name in names)
    assert shapes == {"distill-1": (3, 96, 32, 1, VOCAB - 1), "distill": (3, 64, 32, 1, VOCAB - 1)}
    rows = {(r["name"], r["format"], r["quant"]): r for r in report.read_json("table.json")}
    assert {name for name, _, _ in rows} == {"teacher", "student", "base_fewshot", "svm"}
    student = rows["student", "gguf", "f16"]
    assert student["bytes"] < rows["teacher", "gguf", "f16"]["bytes"]
    assert student["n"] == 12
    assert student["kl_mean"] < 0.001
    assert student["joint_exact_match"][1] <= student["joint_exact_match"][0] <= student["joint_exact_match"][2]
    assert student["decode_tps"] > 0 and student["ttft_s"] > 0 and student["peak_rss_bytes"] > 1e6
    assert rows["svm", None, None]["decode_tps"] is None and rows["svm", None, None]["absent"]["decode_tps"]
    assert all(not verify(open_artifact(p.parent)) for p in tmp_path.glob("*/manifest.json"))

    start = time.monotonic()
    again = edgeft(recipe, tmp_path, *narrow)
    assert again.returncode == 0
    assert time.monotonic() - start < 10
    assert "done in" not in again.stdout + again.stderr


# A teacher that has learned to end its answers.
LONGER = ["--set", "train={method: full, epochs: 12, batch_rows: 8, evaluations: 2, lr: 0.005, precision: fp32}",
          "--set", "targets.max_tokens=128", "--set", "export.max_kl.student=10"]  # fmt: skip


@pytest.mark.slow
def test_a_ready_made_student_learns_from_a_teacher_that_answers_new_messages_and_listens(
    recipe: Path, tmp_path: Path
) -> None:
    sets = [f"student={{model: {recipe.parent / 'small'}}}", f"data.transfer={recipe.parent / 'transfer.jsonl'}",
            "distill.on_policy=0.3"]  # fmt: skip
    done = edgeft(recipe, tmp_path, "--to", "student-gguf-f16", *LONGER, *(w for text in sets for w in ("--set", text)))
    assert done.returncode == 0, done.stderr
    assert "padded to 272 outputs, the teacher's to 262" in done.stdout + done.stderr
    assert artifact(tmp_path, "transfer").metrics == {"transfer_rows": 9, "dropped": {"in_test": 1}}
    answers = artifact(tmp_path, "answers")
    rows = [json.loads(line) for line in answers.file("train.jsonl").open()]
    taught = [row for row in rows if row["meta"].get("source") == "teacher"]
    assert len(rows) == 60 + len(taught) and len(taught) == answers.metrics["kept"] > 0
    assert artifact(tmp_path, "targets").metrics["rows"] == artifact(tmp_path, "distill").metrics["rows"] == len(rows)
    facts = artifact(tmp_path, "distill").metrics
    assert facts["validation"]["loss"] < 0.97 * facts["validation_before"]["loss"]
    assert facts["on_policy"]["share"] == 0.3
    assert not list(tmp_path.glob("student-*"))


@pytest.mark.slow
def test_a_student_with_another_tokenizer_learns_what_the_teacher_writes(recipe: Path, tmp_path: Path) -> None:
    foreign = ["--to", "distill", "--set", f"student={{model: {recipe.parent / 'foreign'}}}", *LONGER]
    done = edgeft(recipe, tmp_path, *foreign)
    assert done.returncode == 2
    assert "another tokenizer than the teacher" in done.stderr and "targets.kind: answers" in done.stderr
    assert not list(tmp_path.glob("train-*"))  # said before anything was trained
    done = edgeft(recipe, tmp_path, *foreign, "--set", "targets.kind=answers")
    assert done.returncode == 0, done.stderr
    facts = artifact(tmp_path, "distill").metrics
    assert facts["rows"] == 60 + artifact(tmp_path, "answers").metrics["kept"]
    assert facts["validation"]["loss"] < 0.97 * facts["validation_before"]["loss"]


@pytest.mark.slow
def test_a_package_that_disagrees_with_its_model_fails_the_export(recipe: Path, tmp_path: Path) -> None:
    done = edgeft(recipe, tmp_path, "--to", "teacher-gguf-f16", "--set", "export.max_kl.f16=1e-12")
    assert done.returncode == 2
    assert "does not agree with the torch model" in done.stderr
    assert not list(tmp_path.glob("export-*/manifest.json"))
    assert artifact(tmp_path, "merge")  # what was finished stays
