from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeft.formats.probe import Probe


def make() -> Probe:
    logits = np.arange(20, dtype=np.float32).reshape(5, 4)
    return Probe([[5, 6, 7, 8], [9, 10], [3, 2, 1]], [[1, 2], [0], [0, 1]], logits, [4, 9, 1], 1, [[7, 8], []], 12)


def test_a_probe_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    make().save(tmp_path)
    back = Probe.load(tmp_path)
    for name in ("rows", "positions", "numbers", "general_rows", "greedy", "greedy_limit"):
        assert getattr(back, name) == getattr(make(), name)
    np.testing.assert_array_equal(back.logits_PV, make().logits_PV)


def test_the_next_ids_are_the_tokens_after_the_positions() -> None:
    assert make().next_ids().tolist() == [7, 8, 10, 2, 1]


def test_a_row_is_found_by_its_number_in_its_split() -> None:
    assert [make().where(row) for row in range(3)] == ["validation:4", "validation:9", "general:1"]
    assert make().prompt(0) == [5, 6]


def test_two_saves_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make().save(tmp_path / name)
    assert (tmp_path / "a/probe.safetensors").read_bytes() == (tmp_path / "b/probe.safetensors").read_bytes()
