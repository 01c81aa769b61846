"""Errors that users see: what was found, and what to do."""

from __future__ import annotations

import pytest

from edgeft import errors


def test_an_error_prints_its_message_and_what_to_do() -> None:
    assert str(errors.DataError("rows.jsonl:7: not valid JSON", "mend that line")) == (
        "rows.jsonl:7: not valid JSON\n  -> mend that line"
    )


def test_an_error_without_a_hint_prints_no_arrow() -> None:
    assert str(errors.ModelError("no such model")) == "no such model"


@pytest.mark.parametrize("kind", ["RecipeError", "DataError", "ModelError", "ArtifactError", "ParityError"])
def test_every_kind_is_caught_as_an_edgeft_error(kind: str) -> None:
    assert issubclass(getattr(errors, kind), errors.EdgeftError)
