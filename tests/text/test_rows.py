"""Reading user rows, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.errors import DataError
from edgeft.text.rows import load_rows, parse_prompt, raise_problems

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return str(path)


def problems_of(tmp_path: Path, *lines: Any) -> list[str]:
    return [p.removeprefix(f"{tmp_path}/") for p in load_rows(write(tmp_path / "r.jsonl", *lines))[1]]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (GOOD, "Hi"),
        ({"prompt": "Hi", "completion": "Hello"}, "Hi"),
        ({"instruction": "Hi", "output": "Hello"}, "Hi"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Hi"),
        ({"instruction": "Hi", "input": "there", "output": "Hello"}, "Hi\n\nthere"),
    ],
)
def test_every_accepted_shape_becomes_a_conversation(tmp_path: Path, row: dict[str, Any], question: str) -> None:
    rows, problems = load_rows(write(tmp_path / "r.jsonl", row))
    assert problems == []
    assert rows[0].messages == ({"role": "user", "content": question}, ANSWER)


def test_meta_is_kept_and_other_columns_join_it(tmp_path: Path) -> None:
    row = {**GOOD, "id": 7, "lang": "en", "meta": {"lang": "fr"}}
    assert load_rows(write(tmp_path / "r.jsonl", row))[0][0].meta == {"id": 7, "lang": "fr"}


def test_a_broken_line_is_named_with_its_number(tmp_path: Path) -> None:
    found = problems_of(tmp_path, GOOD, "", '{"messages": [', GOOD)
    assert found == ["r.jsonl:3: not valid JSON: Expecting value at column 15"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "expected a JSON object, found a list"),
        ({"text": "x"}, "none of messages, prompt, instruction; found the keys ['text']"),
        ({"messages": []}, "messages: expected a list with at least one turn, found an empty list"),
        ({"messages": ["Hi"]}, "messages[0]: expected an object, found text"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "messages[0].role: found None"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "messages[1].role: found 'bot', expected one of system, user",
        ),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "messages[0].content: is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1].content: expected text, found null",
        ),
        ({"messages": [USER]}, "no assistant turn; found only user"),
        ({"messages": [USER, ANSWER, USER]}, "the last turn is 'user'; expected 'assistant'"),
        ({"messages": [ANSWER]}, "no user turn before the first answer"),
        (
            {"messages": [USER, {"role": "system", "content": "x"}, ANSWER]},
            "messages[1]: a system turn may only be the first",
        ),
        ({"prompt": "Hi"}, "completion: expected text, found null"),
        ({"prompt": "Hi", "completion": 3}, "completion: expected text, found a number"),
        ({**GOOD, "meta": [1]}, "meta: expected an object, found a list"),
        ('{"prompt": "a", "completion": "b", "meta": {"x": NaN}}', "NaN is no JSON value"),
        ('{"prompt": "a", "completion": "b", "meta": {"x": 1e999}}', "Out of range float"),
        ('{"prompt": "a", "completion": "\\ud800"}', "holds half a character"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_row_says_what_was_found(tmp_path: Path, row: Any, problem: str) -> None:
    found = problems_of(tmp_path, GOOD, row)
    assert len(found) == 1
    assert found[0].startswith("r.jsonl:2: ") and problem in found[0]


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n')
    rows, problems = load_rows(str(path))
    assert (len(rows), problems) == (1, [f"{path}:2: not UTF-8: byte 0xe9 at position 16"])
    path = tmp_path / "r.csv"
    path.write_bytes(b"prompt,completion\na,caf\xe9\n")
    assert load_rows(str(path))[1] == [f"{path}:2: not UTF-8: byte 0xe9"]


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("r.jsonl", "", "no rows in it"),
    ("r.jsonl", "\n \n", "no rows in it"),
    ("r.csv", "", "no rows in it"),
    ("r.csv", "prompt,completion\n", "no rows in it"),
    ("r.csv", "question,answer\na,b\n", ":1: found the columns question, answer; expected prompt,completion"),
    ("r.csv", "prompt,completion\na,b\nc\n", ":3: 1 values, expected 2"),
    ("r.csv", "prompt,completion\na,b,c\n", ":2: 3 values, expected 2"),
    ("r.csv", 'prompt,completion\na,"b\n', "not valid csv"),
    ("r.txt", "x", "unknown kind of file '.txt'; expected .jsonl, .csv, .parquet"),
    ("r.parquet", "x", "not a readable parquet file"),
])  # fmt: skip
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    problems = load_rows(str(tmp_path / name))[1]
    assert len(problems) == 1
    assert problems[0].startswith(str(tmp_path / name)) and problem in problems[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert load_rows(str(tmp_path / "none.jsonl"))[1] == [f"{tmp_path}/none.jsonl: no such file"]


def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes('\ufeffprompt,completion,lang\r\n"a, ""b""\r\nc",d,en\r\n\r\ne,f,fr\r\n'.encode())
    rows, problems = load_rows(str(path))
    assert problems == []
    assert [r.messages[0]["content"] for r in rows] == ['a, "b"\r\nc', "e"]
    assert [r.meta for r in rows] == [{"lang": "en"}, {"lang": "fr"}]
    assert rows[1].where == f"{path}:5"


def test_parquet_gives_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    values = [{**GOOD, "meta": {"n": 1}}, {"messages": [USER, ANSWER, USER, ANSWER], "meta": {"n": 2}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "r.parquet")
    rows, problems = load_rows(str(tmp_path / "r.parquet"))
    assert problems == []
    expected = load_rows(write(tmp_path / "r.jsonl", *values))[0]
    assert [(r.messages, r.meta) for r in rows] == [(r.messages, r.meta) for r in expected]


def test_a_hub_dataset_is_read_and_its_rows_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(name: str, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.update(name=name, split=split, revision=revision)
        return [GOOD, {"messages": [USER]}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, problems = load_rows("hub:org/name@abc123/test")
    assert asked == {"name": "org/name", "split": "test", "revision": "abc123"}
    assert (len(rows), problems) == (1, ["hub:org/name@abc123/test: row 2: no assistant turn; found only user"])


def test_a_hub_dataset_that_cannot_be_reached_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("hub:org/name")[1] == ["hub:org/name: cannot be loaded: no route"]
    assert "expected hub:ORG/NAME" in load_rows("hub:name")[1][0]


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    _, problems = load_rows(write(tmp_path / "r.jsonl", *["{"] * 13))
    with pytest.raises(DataError) as error:
        raise_problems(problems)
    assert "13 problems" in error.value.message
    assert ":10: " in error.value.message and ":11: " not in error.value.message
    assert error.value.message.endswith("... and 3 more")
    raise_problems([])


def test_rows_to_be_answered_end_with_a_user_turn(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", {"text": "Hi", "lang": "en"}, {"messages": [USER, ANSWER, USER], "meta": {"id": 1}}
    )
    rows, problems = load_rows(path, parse_prompt)
    assert problems == []
    assert rows[0].messages == ({"role": "user", "content": "Hi"},) and rows[0].meta == {"lang": "en"}
    assert rows[1].messages == (USER, ANSWER, USER) and rows[1].meta == {"id": 1}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x"}, "none of messages, text; found the keys"),
        ({"messages": [USER, ANSWER]}, "the last turn is 'assistant'; expected 'user'"),
        ({"messages": [ANSWER, USER]}, "no user turn before the first answer"),
        ({"text": " "}, "text: is empty"),
        ({"text": "x", "meta": 3}, "meta: expected an object, found a number"),
    ],
)
def test_rows_that_cannot_be_answered_say_why(tmp_path: Path, row: Any, problem: str) -> None:
    rows, problems = load_rows(write(tmp_path / "p.jsonl", row), parse_prompt)
    assert rows == [] and len(problems) == 1 and problem in problems[0]
