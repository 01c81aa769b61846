"""How an answer is read: a label and fields from the JSON in its first line, and the reply that the user is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.text.answer import first_line_json, split_answer


@dataclass(frozen=True)
class Task:
    """Where label and fields stand in an answer's JSON, and the labels that pass a conversation on to a person."""

    label_key: str
    fields_key: str
    escalation: tuple[str, ...] = ()

    def label(self, parsed: dict[str, Any] | None) -> str | None:
        value = (parsed or {}).get(self.label_key)
        return value.strip() if isinstance(value, str) else None

    def fields(self, parsed: dict[str, Any] | None) -> dict[str, Any] | None:
        """The fields in the form they are compared in: text stripped, numbers as text."""
        value = (parsed or {}).get(self.fields_key)
        return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else None

    def complete(self, parsed: dict[str, Any] | None) -> bool:
        """Whether both are there with the right types."""
        return self.label(parsed) is not None and self.fields(parsed) is not None

    def gold_label(self, row: dict[str, Any]) -> str | None:
        """The label of a row's reference answer; None if that has no complete JSON first line."""
        parsed = first_line_json(row["messages"][-1]["content"])
        return self.label(parsed) if self.complete(parsed) else None

    def why_no_gold(self) -> str:
        return (
            f"no reference answer starts with a JSON line that holds {self.label_key!r} (text) "
            f"and {self.fields_key!r} (object)"
        )


def reply_of(text: str) -> str:
    """What the user would be shown: the text after a JSON first line, or all of it if there is none."""
    return (split_answer(text)[1] if first_line_json(text) is not None else text).strip()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value)
