"""GGUF files read back: tiny written ones, and the real one against transformers' own reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeft.errors import ModelError
from edgeft.formats.gguf_read import read_gguf
from tests.formats.tiny_gguf import HIDDEN, tiny_weights, write_gguf


def test_every_weight_comes_back_in_hugging_face_order(tmp_path: Path) -> None:
    written = tiny_weights()
    model = read_gguf(write_gguf(tmp_path / "m.gguf", written))
    assert len(model.weights) == len(written)
    for name, gguf_name in (
        ("model.layers.1.self_attn.q_proj", "blk.1.attn_q"),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.layers.1.post_attention_layernorm", "blk.1.ffn_norm"),
        ("model.embed_tokens", "token_embd"),
    ):
        assert np.array_equal(model.weights[f"{name}.weight"], written[f"{gguf_name}.weight"]), name


def test_quantised_blocks_come_back_as_the_values_they_stand_for(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    written = tiny_weights()
    model = read_gguf(write_gguf(tmp_path / "m.gguf", written, quant=kind))
    expected = gguf.dequantize(gguf.quantize(written["blk.0.ffn_up.weight"], kind), kind)
    found = model.weights["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, written["blk.0.ffn_up.weight"])


def test_the_config_says_what_the_file_says(tmp_path: Path) -> None:
    config = read_gguf(write_gguf(tmp_path / "m.gguf")).config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rms_norm_eps"] == 1e-05  # the file holds the float32 next to it, 9.99999975e-06
    assert (config["tie_word_embeddings"], config["head_dim"]) == (True, 8)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_an_output_matrix_of_its_own_means_untied(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["output.weight"] = weights["token_embd.weight"] * 2
    model = read_gguf(write_gguf(tmp_path / "m.gguf", weights))
    assert model.config["tie_word_embeddings"] is False
    assert np.array_equal(model.weights["lm_head.weight"], weights["output.weight"])


def test_digits_stay_apart_only_where_the_file_asks_for_it(tmp_path: Path) -> None:
    apart = read_gguf(write_gguf(tmp_path / "a.gguf", pre="smollm")).tokenizer.encode("12ab").tokens
    merged = read_gguf(write_gguf(tmp_path / "b.gguf", pre="gpt-2")).tokenizer.encode("12ab").tokens
    assert apart == ["1", "2", "ab"]
    assert merged == ["12", "ab"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, options: dict[str, str], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        read_gguf(write_gguf(tmp_path / "m.gguf", **options))  # type: ignore[arg-type]


def test_a_tensor_too_many_or_too_few_is_refused_by_name(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["blk.0.attn_q.bias"] = np.zeros(HIDDEN, np.float32)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_q\.bias"):
        read_gguf(write_gguf(tmp_path / "many.gguf", weights))
    weights = tiny_weights()
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(ModelError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        read_gguf(write_gguf(tmp_path / "few.gguf", weights))


@pytest.mark.parametrize("keep", [0, 3, 500, -400])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        read_gguf(path)
