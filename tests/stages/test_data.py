"""The data stage, on small made-up rows and on real ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.artifact import scan_files
from edgeft.errors import DataError
from edgeft.plan import TransferNode
from edgeft.progress import Reporter
from edgeft.settings import DataSettings
from edgeft.stages import data, transfer
from edgeft.text.encode import load_encoded, read_rows
from edgeft.text.split import mask
from tests.stages.bench_artifacts import write_artifact

WORDS = ("red", "green", "blue", "white", "black", "brown", "pink", "grey", "gold", "teal", "lime", "navy")


def write(path: Path, *questions: str, answer: str = "ok", **meta: Any) -> str:
    rows = [{"prompt": q, "completion": answer, **({"meta": meta} if meta else {})} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sources(folder: Path) -> dict[str, str]:
    return {
        "train": write(folder / "t.jsonl", *(f"paint it {w}" for w in WORDS), "is it 5?", "is it 6?", "same", "Same!"),
        "validation": write(folder / "v.jsonl", "one", "two", "three"),
        "test": write(folder / "e.jsonl", "is it 7?", "TWO", "six"),
    }


def run(folder: Path, said: io.StringIO | None = None, **settings: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return data.run(DataSettings(**settings), {}, folder, Reporter("data", stream=said))


def questions(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in read_rows(path)]


def test_leaks_and_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    metrics = run(tmp_path / "out", **sources(tmp_path))
    assert questions(tmp_path / "out" / "train.jsonl") == [*(f"paint it {w}" for w in WORDS), "same"]
    assert questions(tmp_path / "out" / "validation.jsonl") == ["one", "three"]
    assert questions(tmp_path / "out" / "test.jsonl") == ["is it 7?", "TWO", "six"]
    assert metrics["dropped"] == {"train": {"in_test": 2, "duplicate": 1}, "validation": {"in_test": 1}, "test": {}}
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["splits"]["train"]["read"] == 16
    assert report["splits"]["train"]["kept"] == metrics["train_rows"] == 13
    assert report["splits"]["train"]["characters"]["user"] == {"p50": 13, "p95": 14, "max": 14}


def test_validation_that_is_test_is_kept_and_said_aloud(tmp_path: Path) -> None:
    said = io.StringIO()
    given = sources(tmp_path)
    metrics = run(tmp_path / "out", said, **{**given, "validation": given["test"]}, max_eval_rows=2)
    assert metrics["warnings"] == ["validation_is_test"]
    assert questions(tmp_path / "out" / "validation.jsonl") == questions(tmp_path / "out" / "test.jsonl")
    assert "WARNING every validation row stands in test too" in said.getvalue()
    assert "validation_is_test" in (tmp_path / "out" / "data_report.json").read_text()


def test_samples_are_drawn_after_the_cleaning(tmp_path: Path) -> None:
    metrics = run(tmp_path / "out", **sources(tmp_path), max_train_rows=13, max_eval_rows=2)
    assert (metrics["train_rows"], metrics["validation_rows"], metrics["test_rows"]) == (13, 2, 2)
    assert metrics["dropped"]["test"] == {"not_sampled": 1}


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    settings = {**sources(tmp_path), "max_train_rows": 5, "seed": 3}
    run(tmp_path / "a", **settings)
    run(tmp_path / "b", **settings)
    assert scan_files(tmp_path / "a") == scan_files(tmp_path / "b")
    run(tmp_path / "c", **{**settings, "seed": 4})
    assert scan_files(tmp_path / "a")["train.jsonl"] != scan_files(tmp_path / "c")["train.jsonl"]


def test_system_and_target_reach_every_split(tmp_path: Path) -> None:
    given = {
        name: write(tmp_path / f"{name}.jsonl", name, target={"intent": name})
        for name in ("train", "validation", "test")
    }
    run(tmp_path / "out", **given, system="Be brief.", target_field="meta.target")
    for name in given:
        row = read_rows(tmp_path / "out" / f"{name}.jsonl")[0]
        assert [m["content"] for m in row["messages"]] == ["Be brief.", name, f'{{"intent": "{name}"}}\nok']
        assert row["meta"] == {"target": {"intent": name}}


def test_rows_without_the_target_are_counted(tmp_path: Path) -> None:
    said = io.StringIO()
    metrics = run(tmp_path / "out", said, **sources(tmp_path), target_field="meta.target")
    assert metrics["warnings"] == ["target_missing"]
    assert "22 rows have no meta.target" in said.getvalue()


def test_a_file_named_twice_is_completed_once(tmp_path: Path) -> None:
    path = write(tmp_path / "v.jsonl", "one", target="T")
    train = write(tmp_path / "t.jsonl", "two", target="T")
    run(tmp_path / "out", train=train, validation=path, test=path, target_field="meta.target")
    assert read_rows(tmp_path / "out" / "test.jsonl")[0]["messages"][1]["content"] == "T\nok"


def test_the_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (tmp_path / "v.jsonl").write_text("")
    (tmp_path / "e.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError) as error:
        run(
            tmp_path / "out",
            **{n: str(tmp_path / f"{f}.jsonl") for n, f in (("train", "t"), ("validation", "v"), ("test", "e"))},
        )
    message = error.value.message
    assert message.startswith("3 problems in the rows")
    for part in ("t.jsonl:2: not valid JSON", "v.jsonl: no rows", "e.jsonl:1: no assistant turn"):
        assert part in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_target_names_its_row(tmp_path: Path) -> None:
    given = {**sources(tmp_path), "test": write(tmp_path / "e.jsonl", "x", target=5)}
    with pytest.raises(DataError, match=r"e\.jsonl:1: meta\.target: expected one line of text or an object, found 5"):
        run(tmp_path / "out", **given, target_field="meta.target")


def test_training_on_the_test_rows_is_refused(tmp_path: Path) -> None:
    given = sources(tmp_path)
    with pytest.raises(DataError, match="no train row is left: all 3 stand in validation or test"):
        run(tmp_path / "out", **{**given, "train": given["test"]})


@pytest.fixture(scope="module")
def bitext(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train, dev = (real_data / f"bitext_support.{name}.jsonl" for name in ("train_freshslots", "dev"))
    out = tmp_path_factory.mktemp("bitext")
    run(out, train=str(train), validation=str(dev), test=str(dev), target_field="meta.target_json", max_eval_rows=200)
    return out


def test_no_real_utterance_of_test_is_left_in_train(bitext: Path) -> None:
    def masked(name: str) -> list[str]:
        rows = read_rows(bitext / f"{name}.jsonl")
        return [mask(row["messages"][0]["content"], row["meta"]["entities"])[0] for row in rows]

    assert set(masked("train")).isdisjoint(masked("test"))
    report = json.loads((bitext / "data_report.json").read_text())["splits"]["train"]
    assert report["dropped"] == {"in_test": 402, "duplicate": 28, "duplicate_with_other_answer": 19}
    assert report["kept"] == 6480 - 402 - 28 - 19
    assert len(read_rows(bitext / "test.jsonl")) == 200


def test_real_rows_become_token_ids(bitext: Path, smollm2: Path) -> None:
    from edgeft.text.chat import ChatTokenizer

    chat = ChatTokenizer.from_folder(smollm2)
    rows = read_rows(bitext / "test.jsonl")
    for row, encoded in zip(rows, load_encoded(bitext / "test.jsonl", chat, 160), strict=True):
        answer = [i for i, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
        assert chat.decode(answer) == row["messages"][-1]["content"]
        assert answer == chat.answer_ids(row["messages"][-1]["content"])
        assert json.loads(chat.decode(answer).split("\n")[0])["intent"] == row["meta"]["intent"]


def test_replayed_chats_are_sampled_and_never_stand_in_another_split(tmp_path: Path) -> None:
    given = sources(tmp_path)
    replay = write(tmp_path / "r.jsonl", "is it 9?", "one", *(f"tell me about {w}" for w in WORDS))
    metrics = run(tmp_path / "out", **given, replay=replay, replay_share=0.25)
    assert metrics["replay_rows"] == round(metrics["train_rows"] / 3)
    assert all(q.startswith("tell me about") for q in questions(tmp_path / "out" / "replay.jsonl"))
    assert not any("tell me" in q for q in questions(tmp_path / "out" / "train.jsonl"))


def test_replayed_text_is_taken_by_paragraph_and_learned_whole(tmp_path: Path, smollm2: Path) -> None:
    from edgeft.text.chat import ChatTokenizer

    (tmp_path / "r.txt").write_text("One paragraph\nof two lines.\n\n\n\nAnother one.\n", "utf-8")
    run(tmp_path / "out", **sources(tmp_path), replay=str(tmp_path / "r.txt"), replay_share=0.5)
    path = tmp_path / "out" / "replay.jsonl"
    assert read_rows(path) == [{"text": "One paragraph\nof two lines."}, {"text": "Another one."}]
    chat = ChatTokenizer.from_folder(smollm2)
    rows = load_encoded(path, chat, 5)
    assert [chat.decode(row.ids) for row in rows] == ["One paragraph\nof two", "Another one."]
    assert all(row.trained == (False, *[True] * (len(row.ids) - 1)) for row in rows)


def test_a_replay_file_of_other_bytes_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        run(tmp_path / "out", **sources(tmp_path), replay=str(tmp_path / "r.txt"))


def test_a_replay_file_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        run(tmp_path / "out", **sources(tmp_path), replay=str(tmp_path / "r.txt"))


def transferred(folder: Path, text: str) -> dict[str, Any]:
    """The transfer stage over the splits of `sources`."""
    run(folder / "data", **sources(folder))
    path = folder / "messages.jsonl"
    path.write_text(text)
    splits = [folder / "data" / f"{name}.jsonl" for name in data.SPLITS]
    given = write_artifact(folder / "given", "dataset", {split.name: split.read_text() for split in splits})
    (folder / "out").mkdir()
    cfg = TransferNode(transfer=str(path), system="Be brief.")
    return transfer.run(cfg, {"dataset": given}, folder / "out", Reporter("transfer"))


def test_messages_to_be_answered_are_cleaned_of_the_splits_and_counted(tmp_path: Path) -> None:
    asked = ["new", "is it 9?", "One!", "paint it red", "new"]
    metrics = transferred(tmp_path, "".join(json.dumps({"text": text}) + "\n" for text in asked))
    (kept,) = read_rows(tmp_path / "out" / "transfer.jsonl")
    assert [m["content"] for m in kept["messages"]] == ["Be brief.", "new"]
    assert metrics == {"transfer_rows": 1, "dropped": {"duplicate": 2, "in_test": 1, "in_validation": 1}}
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["splits"]["transfer"]
    assert (report["read"], report["kept"], report["dropped"]) == (5, 1, metrics["dropped"])


def test_messages_that_are_no_rows_or_all_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"messages.jsonl:1: none of messages, text") as caught:
        transferred(tmp_path, '{"prompt": "a"}\n')
    assert "a row to be answered is" in caught.value.hint
    (tmp_path / "again").mkdir()
    with pytest.raises(DataError, match="all 1 rows stand in train, validation or test too"):
        transferred(tmp_path / "again", '{"text": "six"}\n')
