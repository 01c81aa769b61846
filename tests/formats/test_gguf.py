from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.errors import ModelError
from edgeft.formats.gguf import tensor_types, write_gguf
from edgeft.formats.gguf_quant import quantize
from edgeft.formats.gguf_reader import Reader
from edgeft.formats.parity import Parity, compare
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_gguf import permute
from tests.formats.tiny_model import HEADS, KV_HEADS, LAYERS, TEXTS, make_probe, write_tiny_llama

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def f32(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "model.gguf"
    write_gguf(model, path, "f32")
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def parity(path: Path, model: Path, kv: Any = "f16") -> Parity:
    probe = make_probe(model, TEXTS)
    session = LlamaCppSession(path, 1, 256, kv)
    scored = list(session.score(list(zip(probe.rows, probe.positions, strict=True))))
    session.close()
    return compare(probe.logits_PV, np.concatenate(scored), probe.next_ids())


def test_every_tensor_stands_in_the_file_under_its_name(model: Path, f32: Path) -> None:
    weights, found = load_file(model / "model.safetensors"), tensors(f32)
    expected = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(LAYERS):
        for source, target in NAMES.items():
            tensor = weights[f"model.layers.{layer}.{source}.weight"]
            if target in ("attn_q", "attn_k"):
                tensor = permute(tensor, HEADS if target == "attn_q" else KV_HEADS)
            expected[f"blk.{layer}.{target}.weight"] = tensor
    assert found.keys() == expected.keys()  # no head: it is tied to the embedding
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].data, tensor, err_msg=name)


def test_the_metadata_describe_the_model(model: Path, f32: Path) -> None:
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "llama.block_count": LAYERS,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.context_length": 512,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (model / "chat_template.jinja").read_text(),
    }
    assert {key: value(f32, key) for key in expected} == expected
    assert value(f32, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)


def test_tokens_keep_their_ids_types_and_merges(model: Path, f32: Path) -> None:
    raw = json.loads((model / "tokenizer.json").read_text())
    texts, types = value(f32, "tokenizer.ggml.tokens"), value(f32, "tokenizer.ggml.token_type")
    assert all(texts[i] == text for text, i in raw["model"]["vocab"].items())
    num_known = len(raw["model"]["vocab"])
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert set(types[3:num_known]) == {gguf.TokenType.NORMAL}
    assert set(types[num_known:]) == {gguf.TokenType.UNUSED} and len(types) == 320
    assert value(f32, "tokenizer.ggml.merges") == [" ".join(m) for m in raw["model"]["merges"]]


def test_the_end_of_turn_is_eos_even_if_the_tokenizer_names_another(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    write_gguf(model, tmp_path / "model.gguf", "f32")
    assert value(tmp_path / "model.gguf", "tokenizer.ggml.eos_token_id") == 2


@pytest.mark.parametrize("drop", ["rope_theta", "rope_parameters"])
def test_the_rope_base_is_found_where_either_transformers_version_writes_it(drop: str, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config[drop]
    (model / "config.json").write_text(json.dumps(config))
    write_gguf(model, tmp_path / "model.gguf", "f32")
    assert value(tmp_path / "model.gguf", "llama.rope.freq_base") == 5000.0


def test_f32_predicts_exactly_what_torch_predicts(model: Path, f32: Path) -> None:
    found = parity(f32, model, "f32")
    assert found.kl_max < 1e-6 and found.top1 == 1.0
    assert found.perplexity == pytest.approx(found.perplexity_reference, rel=1e-4)


def test_the_file_says_what_it_is_called_and_how_large_it_is(model: Path, f32: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf", "f16", "my-desk-teacher")
    assert value(tmp_path / "model.gguf", "general.name") == "my-desk-teacher"
    assert value(f32, "general.name") == model.name
    weights = load_file(model / "model.safetensors")
    assert value(f32, "general.size_label") == f"{round(sum(w.size for w in weights.values()) / 1000)}K"


def test_the_fast_reader_reads_what_the_gguf_packages_does(f32: Path, tmp_path: Path) -> None:
    quantize(f32, tmp_path / "q8_0.gguf", "q8_0", threads=1)
    for path in (f32, tmp_path / "q8_0.gguf"):
        ours, theirs = Reader(path), gguf.GGUFReader(path)
        assert {name: f.contents() for name, f in ours.fields.items()} == {
            name: f.contents() for name, f in theirs.fields.items()
        }
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            assert (a.name, a.tensor_type, a.shape.tolist(), a.n_bytes) == (
                b.name,
                b.tensor_type,
                b.shape.tolist(),
                b.n_bytes,
            )
            np.testing.assert_array_equal(a.data, b.data)
    (tmp_path / "short.gguf").write_bytes(f32.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="buffer"):
        Reader(tmp_path / "short.gguf")


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", tie=False)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(tensors(tmp_path / "model.gguf")["output.weight"].data, head)
    assert parity(tmp_path / "model.gguf", model, "f32").kl_max < 1e-6


def test_vectors_stay_in_f32_in_an_f16_file(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "model.gguf", "f16")
    for name, tensor in tensors(tmp_path / "model.gguf").items():
        assert tensor.tensor_type.name == ("F32" if "norm" in name else "F16"), name
    assert parity(tmp_path / "model.gguf", model).kl_mean < 1e-4


def test_two_writes_give_the_same_bytes(model: Path, f32: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "again.gguf", "f32")
    assert (tmp_path / "again.gguf").read_bytes() == f32.read_bytes()


def test_a_quantised_file_is_smaller_and_close(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "f16.gguf", "f16")
    quantize(tmp_path / "f16.gguf", tmp_path / "q8_0.gguf", "q8_0", threads=1)
    assert tensor_types(tmp_path / "q8_0.gguf") == {"F32": 2 * LAYERS + 1, "Q8_0": 7 * LAYERS + 1}
    assert 0 < parity(tmp_path / "q8_0.gguf", model).kl_mean < 0.05


def test_a_failed_quantisation_says_what_llamacpp_said(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"broken\.gguf to q8_0: .*\w{4}"):
        quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf", "q8_0", threads=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3' without low_freq_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 256}, "sliding window of 256"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1, 1]}, "every fourth"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "sliding_window_pattern": 4},
            "in 6",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 100}, "100 tokens"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=named):
        write_gguf(model, tmp_path / "model.gguf", "f32")


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "model.layers.0.extra.weight": np.ones((2, 2), np.float32)}, model / "model.safetensors")
    with pytest.raises(ModelError, match="extra"):
        write_gguf(model, tmp_path / "model.gguf", "f32")


def test_weights_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        write_gguf(model, tmp_path / "model.gguf", "f16")


def test_smollm2_tokenises_the_same_in_llamacpp(smollm2: Path, tmp_path: Path) -> None:
    write_gguf(smollm2, tmp_path / "model.gguf", "f16")
    chat, session = ChatTokenizer.from_folder(smollm2), LlamaCppSession(tmp_path / "model.gguf", 1, 64)
    for text in (*TEXTS, "x=2024\n\n  <|im_end|> 你好 👩‍💻\tdon't", "", "\u00a0  "):
        messages = [{"role": "user", "content": text}]
        assert session.prompt_ids(messages) == chat.prompt_ids(messages)
        assert session.answer_ids(text) == chat.answer_ids(text)
    session.close()
