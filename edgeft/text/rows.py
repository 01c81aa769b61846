"""Reading user rows from .jsonl, .csv, .parquet or a hub dataset; every problem is found before any is reported."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import DataError

MAX_PROBLEMS = 10  # shown at once, over all files
ROLES = ("system", "user", "assistant")
HINT = (
    'a row is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "meta": {...}}, '
    'or {"prompt", "completion"}, or {"instruction", "input", "output"}; a csv file has columns prompt,completion'
)
PROMPT_HINT = (
    'a row to be answered is {"messages": [..., {"role": "user", "content": ...}]} or {"text": ...}, in a .jsonl or '
    ".parquet file or on the hub"
)
HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w.-]+))?")


@dataclass(frozen=True)
class Row:
    """A conversation that ends with an assistant turn, or a prompt; `where` names its place in the source."""

    messages: tuple[dict[str, str], ...]
    meta: dict[str, Any]
    where: str
    raw: dict[str, Any] = field(repr=False)  # as it was read, for fields named by the recipe


class RowProblem(ValueError):
    """One row that cannot be used."""


def load_rows(source: str, parse: Callable[[Any, str], Row] | None = None) -> tuple[list[Row], list[str]]:
    """All usable rows of one source, and one line per problem (file:line: found, expected).

    `parse` is `parse_row` unless given: for prompts it is `parse_prompt`.
    """
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for where, value in _read(source):
            try:
                rows.append((parse or parse_row)(_value(value), where))
            except json.JSONDecodeError as error:
                problems.append(f"{where}: not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: {error}")
    except RowProblem as error:
        problems.append(str(error))
    if not rows and not problems:
        problems.append(f"{source}: no rows in it; expected at least one")
    return rows, problems


def raise_problems(problems: list[str], hint: str = HINT) -> None:
    """Raise one DataError that lists the first problems and counts the rest; nothing if there is none."""
    if problems:
        shown = problems[:MAX_PROBLEMS]
        rest = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        lines = "".join(f"\n  {problem}" for problem in shown)
        raise DataError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the rows{lines}{rest}", hint)


def parse_row(value: Any, where: str) -> Row:
    """One row in any accepted shape as a conversation; other columns go to `meta`. Raises ValueError."""
    value = _object(value)
    if "messages" in value:
        used, messages = {"messages"}, _answered(_messages(value["messages"]))
    elif "prompt" in value or "completion" in value:
        used, messages = {"prompt", "completion"}, _pair(value, "prompt", "completion")
    elif "instruction" in value or "output" in value:
        used, messages = {"instruction", "input", "output"}, _pair(value, "instruction", "output", extra="input")
    else:
        raise RowProblem(f"none of messages, prompt, instruction; found the keys {sorted(map(str, value))}")
    return _row(value, messages, used, where)


def parse_prompt(value: Any, where: str) -> Row:
    """One row without an answer, {"messages"} that end with a user turn or {"text"}. Raises ValueError."""
    value = _object(value)
    if "messages" in value:
        messages = _messages(value["messages"])
        if messages[-1]["role"] != "user":
            raise RowProblem(f"the last turn is {messages[-1]['role']!r}; expected 'user', for the teacher answers")
        return _row(value, messages, {"messages"}, where)
    if "text" in value:
        return _row(value, ({"role": "user", "content": _text(value["text"], "text")},), {"text"}, where)
    raise RowProblem(f"none of messages, text; found the keys {sorted(map(str, value))}")


def _object(value: Any) -> dict[str, Any]:
    """A row whose `meta`, if it has one, is an object."""
    if not isinstance(value, dict):
        raise RowProblem(f"expected a JSON object, found {_kind(value)}")
    if not isinstance(value.get("meta") or {}, dict):
        raise RowProblem(f"meta: expected an object, found {_kind(value['meta'])}")
    return value


def _row(value: dict[str, Any], messages: tuple[dict[str, str], ...], used: set[str], where: str) -> Row:
    meta = value.get("meta") or {}
    meta = {**{k: v for k, v in value.items() if k not in used | {"meta"}}, **meta}
    try:
        json.dumps([messages, meta], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RowProblem("holds half a character (a lone surrogate such as \\ud800)") from None
    except TypeError as error:
        raise RowProblem(f"meta: {error}") from None
    return Row(messages, meta, where, value)


def _value(read: Any) -> Any:
    """What was read as an object: JSON text is parsed, a problem raised."""
    if isinstance(read, RowProblem):
        raise read
    return json.loads(read, parse_constant=_refuse) if isinstance(read, str) else read


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise RowProblem(f"messages: expected a list with at least one turn, found {_kind(value)}")
    messages = tuple(_message(item, f"messages[{n}]") for n, item in enumerate(value))
    roles = [m["role"] for m in messages]
    if "system" in roles[1:]:
        raise RowProblem(f"messages[{roles.index('system', 1)}]: a system turn may only be the first")
    if "assistant" in roles and "user" not in roles[: roles.index("assistant")]:
        raise RowProblem("no user turn before the first answer")
    return messages


def _answered(messages: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """The same conversation, if it ends with an answer."""
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise RowProblem(f"no assistant turn; found only {', '.join(sorted(set(roles)))}")
    if roles[-1] != "assistant":
        raise RowProblem(f"the last turn is {roles[-1]!r}; expected 'assistant'")
    return messages


def _message(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise RowProblem(f"{name}: expected an object, found {_kind(value)}")
    if value.get("role") not in ROLES:
        raise RowProblem(f"{name}.role: found {value.get('role')!r}, expected one of {', '.join(ROLES)}")
    return {"role": value["role"], "content": _text(value.get("content"), f"{name}.content")}


def _pair(value: dict[str, Any], prompt: str, answer: str, extra: str = "") -> tuple[dict[str, str], ...]:
    question = _text(value.get(prompt), prompt)
    if extra and value.get(extra):
        question = f"{question}\n\n{_text(value[extra], extra)}"
    return (
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(value.get(answer), answer)},
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"{name}: expected text, found {_kind(value)}")
    if not value.strip():
        raise RowProblem(f"{name}: is empty; expected text")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else "an empty list" if value == [] else names.get(type(value), type(value).__name__)


def _refuse(name: str) -> None:
    raise RowProblem(f"{name} is no JSON value")


def _read(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a source; a row is JSON text, an object or a RowProblem. Raises one for the source itself."""
    if source.startswith("hub:"):
        yield from _read_hub(source)
        return
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        known = ", ".join(readers)
        raise RowProblem(f"{source}: unknown kind of file {path.suffix!r}; expected {known} or hub:ORG/NAME")
    if not path.is_file():
        raise RowProblem(f"{source}: no such file")
    yield from readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            try:
                text: Any = line.rstrip(b"\r\n").decode("utf-8-sig")  # some editors write a byte order mark
            except UnicodeDecodeError as error:
                text = RowProblem(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
            if line.strip():
                yield f"{path}:{number}", text


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RowProblem(f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = list(reader.fieldnames or [])
    if columns and not {"prompt", "completion"} <= set(columns) and not {"instruction", "output"} <= set(columns):
        raise RowProblem(f"{path}:1: found the columns {', '.join(columns)}; expected prompt,completion")
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            found = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
            yield where, row if found == len(columns) else RowProblem(f"{found} values, expected {len(columns)}")
    except csv.Error as error:
        raise RowProblem(f"{path}:{reader.line_num}: not valid csv: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RowProblem(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}: row {number}", row


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    match = HUB_NAME.fullmatch(source)
    if not match:
        raise RowProblem(f"{source}: expected hub:ORG/NAME, hub:ORG/NAME/SPLIT or hub:ORG/NAME@REVISION/SPLIT")
    import datasets

    datasets.disable_progress_bars()  # the reporter speaks, libraries do not
    name, revision, split = match.groups()
    try:
        rows = datasets.load_dataset(name, split=split or "train", revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RowProblem(f"{source}: cannot be loaded: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row
