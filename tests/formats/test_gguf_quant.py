from __future__ import annotations

from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest

from edgeft.errors import ModelError, RecipeError
from edgeft.export_settings import NEED_IMPORTANCE, GgufQuant, TensorType
from edgeft.formats.diff import diff, where_they_part
from edgeft.formats.gguf import FLOATS, tensor_names, write_gguf
from edgeft.formats.gguf_quant import FILE_TYPES, quantize, rename_importance, types_by_tensor
from edgeft.formats.importance import Importance
from tests.formats.tiny_model import write_tiny_llama

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
UNMADE = {"mxfp4_moe", "nvfp4", "q2_0"}  # for mixtures of experts; not made by llama.cpp; unknown to gguf 0.19
UNREADABLE = ("q1_0",)  # gguf 0.19 knows how large they are, not what they mean


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), network=WIDE)


@pytest.fixture(scope="module")
def full(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f16") / "model.gguf"
    write_gguf(model, path, "f16")
    return path


@pytest.fixture(scope="module")
def importance(model: Path) -> Importance:
    names = {name for name in tensor_names(model) if "proj" in name} | {"lm_head.weight"}
    draw = np.random.default_rng(0)
    return {name: draw.uniform(0.1, 10, 256).astype(np.float32) for name in names}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def test_the_recipe_knows_every_type_that_llamacpp_makes() -> None:
    assert set(get_args(GgufQuant)) == {"f32", *FILE_TYPES} - UNMADE
    assert all(kind.upper() in gguf.GGMLQuantizationType.__members__ for kind in get_args(TensorType))


@pytest.mark.parametrize(
    "quant",
    [
        pytest.param(quant, marks=[pytest.mark.slow] if quant.startswith(("iq1", "iq2")) else [])
        for quant in get_args(GgufQuant)
        if quant not in FLOATS
    ],
)
def test_every_type_is_made(quant: str, model: Path, full: Path, importance: Importance, tmp_path: Path) -> None:
    named = rename_importance(importance, tensor_names(model))
    quantize(full, tmp_path / "q.gguf", quant, 1, named)
    assert (tmp_path / "q.gguf").stat().st_size < full.stat().st_size
    if quant in NEED_IMPORTANCE:
        with pytest.raises(ModelError, match="imatrix|importance matrix"):
            quantize(full, tmp_path / "without.gguf", quant, 1)
    if quant in UNREADABLE:
        assert "Q1_0, which the gguf package cannot turn into numbers" in where_they_part(model, tmp_path / "q.gguf")
    else:
        found = diff(model, tmp_path / "q.gguf", layers=False)
        assert not found.facts and not found.missing and max(gap.error for gap in found.tensors) < 1


@pytest.mark.parametrize("kind", get_args(TensorType))
def test_every_type_of_a_part_is_made(
    kind: str, model: Path, full: Path, importance: Importance, tmp_path: Path
) -> None:
    names = tensor_names(model)
    rules = types_by_tensor({"ffn_down": kind}, names.values())
    quantize(full, tmp_path / "q.gguf", "q8_0", 1, rename_importance(importance, names), rules)
    assert types(tmp_path / "q.gguf")["blk.0.ffn_down.weight"] == kind


def test_important_channels_are_kept_closer(model: Path, full: Path, importance: Importance, tmp_path: Path) -> None:
    names = tensor_names(model)
    matrix = "model.layers.0.mlp.up_proj.weight"
    importance = {**importance, matrix: np.where(np.arange(256) % 2, 1e3, 1e-3).astype(np.float32)}
    errors = []
    for given in (None, rename_importance(importance, names)):
        quantize(full, tmp_path / "q.gguf", "q4_0", 1, given)
        found = {t.name: t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}[names[matrix]]
        exact = {t.name: t for t in gguf.GGUFReader(full).tensors}[names[matrix]]
        assert found.tensor_type.name == "Q4_0"
        lost = gguf.dequantize(found.data, found.tensor_type) - exact.data.astype(np.float32)
        errors.append(np.square(lost).mean(0)[1::2].sum())
    assert errors[1] < 0.9 * errors[0]


def test_the_first_rule_that_fits_decides(model: Path, full: Path, tmp_path: Path) -> None:
    names = tensor_names(model).values()
    rules = {"head": "q8_0", "ffn_down": "q6_k", "blk.0.*": "q5_k"}
    quantize(full, tmp_path / "q.gguf", "q4_k_m", 1, types=types_by_tensor(rules, names))
    found = types(tmp_path / "q.gguf")
    assert found["token_embd.weight"] == "q8_0"  # the head of this model is its embedding
    assert found["blk.0.ffn_down.weight"] == "q6_k"
    assert found["blk.0.attn_q.weight"] == found["blk.0.ffn_up.weight"] == "q5_k"
    assert found["blk.0.attn_norm.weight"] == "f32"


def test_a_head_of_its_own_is_the_head() -> None:
    names = ["token_embd.weight", "output.weight", "blk.0.ffn_up.weight"]
    assert types_by_tensor({"head": "q8_0"}, names) == {"output.weight": "q8_0"}
    assert types_by_tensor({"*": "q8_0", "embedding": "f16"}, names) == dict.fromkeys(names, "q8_0")


def test_a_rule_that_fits_nothing_is_an_error_that_names_the_parts() -> None:
    with pytest.raises(RecipeError, match="'atn_q' fits no matrix") as caught:
        types_by_tensor({"atn_q": "q8_0"}, ["blk.0.attn_q.weight"])
    assert "attn_q" in caught.value.hint


def test_the_importance_of_another_model_is_refused(model: Path, importance: Importance) -> None:
    missing = {name: mean for name, mean in importance.items() if "up_proj" not in name}
    with pytest.raises(ModelError, match=r"another model: .* blk\.0\.ffn_up\.weight"):
        rename_importance(missing, tensor_names(model))
