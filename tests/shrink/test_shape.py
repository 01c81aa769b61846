"""Shapes: their sizes, and the search for the largest that is fast enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.errors import RecipeError
from edgeft.formats.hf import load_model, read_config
from edgeft.shrink.shape import MEASUREMENTS, Shape, find_shape
from tests.formats.tiny_model import write_tiny_llama

SMOLLM = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=16384, tied=True)


def speedup(shape: Shape, bias: float = 1.0) -> float:
    """A machine on which a layer costs as much as its attention, its FFN channels, and something of its own."""
    return 60.0 / (10 + shape.layers * (0.4 + 0.8 * bias * shape.ffn / 1536))


@pytest.mark.parametrize("tie", [True, False])
def test_a_shape_counts_the_matrices_of_its_config(tmp_path: Path, tie: bool) -> None:
    model = load_model(write_tiny_llama(tmp_path, tie=tie))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert Shape.of(read_config(tmp_path)).parameters == matrices


def test_a_shape_written_into_a_config_is_read_from_it_again(tmp_path: Path) -> None:
    config = read_config(write_tiny_llama(tmp_path))
    shape = replace(Shape.of(config), layers=2, ffn=64, heads=2, kv_heads=1, vocabulary=300)
    assert Shape.of(shape.into(config)) == shape
    assert shape.into(config)["rms_norm_eps"] == config["rms_norm_eps"]


def test_a_narrower_shape_keeps_the_query_heads_of_its_kv_heads_and_loads() -> None:
    narrow = SMOLLM.narrowed(8192, 512, 2)
    assert (narrow.vocabulary, narrow.hidden, narrow.kv_heads, narrow.heads) == (8192, 512, 2, 6)
    assert narrow.into({"model_type": "llama"})["model_type"] == "mistral"  # 512 is no multiple of 6
    assert SMOLLM.into({"model_type": "llama"})["model_type"] == "llama"


def test_of_all_shapes_that_are_fast_enough_the_largest_is_found() -> None:
    chosen, timed = find_shape(SMOLLM, 2.0, speedup)
    every = [replace(SMOLLM, layers=n, ffn=w) for n in range(1, 31) for w in range(256, 1537, 256)]
    best = max((s for s in every if speedup(s) >= 2.0), key=lambda s: s.parameters)
    assert chosen.shape == best
    assert len(timed) <= MEASUREMENTS


def test_a_machine_that_is_not_as_the_fit_supposes_gets_no_shape_that_is_too_slow() -> None:
    chosen, timed = find_shape(SMOLLM, 2.5, lambda s: speedup(s, bias=1 + 0.5 * (s.layers > 12)))
    assert chosen.speedup >= 2.5
    assert len(timed) <= MEASUREMENTS


def test_a_rate_that_no_shape_reaches_is_an_error_that_names_the_fastest() -> None:
    with pytest.raises(RecipeError, match=r"decode_speedup is 9\.0; the fastest shape, 1 layers with an FFN of 256"):
        find_shape(SMOLLM, 9.0, speedup)
