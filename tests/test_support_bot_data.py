"""The embedded dataset is what its card says."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgeft.text.split import mask

FOLDER = Path(__file__).parent.parent / "recipes" / "support-bot"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def splits() -> dict[str, Rows]:
    return {
        s: [json.loads(line) for line in (FOLDER / f"{s}.jsonl").open(encoding="utf-8")]
        for s in ("train", "validation", "test")
    }


def users(row: dict[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def test_it_is_large_and_varied_enough(splits: dict[str, Rows]) -> None:
    assert len(splits["train"]) >= 1500
    assert len(splits["validation"]) >= 200
    assert len(splits["test"]) >= 300
    for rows in splits.values():
        assert len({r["meta"]["intent"] for r in rows}) >= 30
        assert len({r["meta"]["category"] for r in rows}) >= 8
        assert len({slot for r in rows for slot in r["meta"]["entities"]}) >= 6
        assert any(len(users(r)) > 1 for r in rows)


def test_no_masked_utterance_stands_in_two_splits(splits: dict[str, Rows]) -> None:
    masked = {s: {mask("\n".join(users(r)), r["meta"]["entities"])[0] for r in rows} for s, rows in splits.items()}
    assert not masked["train"] & masked["validation"]
    assert not masked["train"] & masked["test"]
    assert not masked["validation"] & masked["test"]


def test_no_utterance_is_given_twice_within_validation_or_test(splits: dict[str, Rows]) -> None:
    for split in ("validation", "test"):
        texts = Counter("\n".join(users(r)).lower() for r in splits[split])
        assert [t for t, n in texts.items() if n > 1] == []


def test_a_tenth_of_the_rows_is_out_of_scope_or_asks_for_a_person(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        share = sum(r["meta"]["intent"] in ("out_of_scope", "human_agent") for r in rows) / len(rows)
        assert share >= 0.1


def test_every_value_is_copied_from_the_customers_text(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        for r in rows:
            assert all(any(value in text for text in users(r)) for value in r["meta"]["entities"].values()), r["meta"][
                "id"
            ]


def test_every_answer_is_a_json_line_and_a_reply(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        for r in rows:
            for m in r["messages"][1::2]:
                first, reply = m["content"].split("\n")
                assert set(json.loads(first)) == {"intent", "entities"}
                assert 3 <= len(reply.split()) <= 30
                assert "{" not in reply
            assert r["messages"][-1]["content"].startswith(r["meta"]["target_json"])


def test_values_almost_never_repeat(splits: dict[str, Rows]) -> None:
    for slot in ("order_id", "product", "email", "coupon_code"):
        values = [r["meta"]["entities"][slot] for r in splits["train"] if slot in r["meta"]["entities"]]
        assert len(set(values)) >= 0.95 * len(values), slot


def test_held_out_products_places_and_ids_are_new(splits: dict[str, Rows]) -> None:
    """A model that learns values by heart gains nothing."""
    for slot in ("order_id", "product", "place", "email"):
        seen = {str(r["meta"]["entities"].get(slot)).lower() for r in splits["train"]}
        for split in ("validation", "test"):
            values = [r["meta"]["entities"][slot] for r in splits[split] if slot in r["meta"]["entities"]]
            known = [v for v in values if v.lower() in seen]
            assert len(known) <= 0.05 * len(values), (split, slot, known)


def test_no_order_number_in_the_text_is_left_out_of_the_entities(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        for r in rows:
            found = [t for text in users(r) for t in re.findall(r"(?<![\d.])\d{6}(?!\d)", text)]
            assert all(any(f in v for v in r["meta"]["entities"].values()) for f in found), r["meta"]["id"]


def test_it_is_exactly_what_its_source_gives() -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "make_data.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
