from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeft.formats.probe import Probe


def make() -> Probe:
    return Probe([[5, 6, 7, 8], [9, 10]], [[1, 2], [0]], np.arange(12, dtype=np.float32).reshape(3, 4))


def test_a_probe_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    make().save(tmp_path)
    back = Probe.load(tmp_path)
    assert back.rows == make().rows
    assert back.positions == make().positions
    np.testing.assert_array_equal(back.logits_PV, make().logits_PV)


def test_the_next_ids_are_the_tokens_after_the_positions() -> None:
    assert make().next_ids().tolist() == [7, 8, 10]


def test_two_saves_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make().save(tmp_path / name)
    assert (tmp_path / "a/probe.safetensors").read_bytes() == (tmp_path / "b/probe.safetensors").read_bytes()
