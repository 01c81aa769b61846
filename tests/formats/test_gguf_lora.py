from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.errors import ModelError
from edgeft.formats.gguf import write_gguf
from edgeft.formats.gguf_lora import write_lora
from tests.formats.tiny_family import write_tiny

IDS = [1, 40, 77, 5, 190, 63, 121]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(base: Path, folder: Path) -> Any:
    """A random adapter over every matrix, saved as PEFT does; returns the model with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


def llamacpp_logits(model: Path, lora: Path | None) -> np.ndarray[Any, Any]:
    session = LlamaCppSession(model, 1, 64, "f32")
    if lora:
        adapter = lib.llama_adapter_lora_init(session._model.pointer, os.fsencode(lora))
        assert adapter
        adapters, scales = (lib.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert lib.llama_set_adapters_lora(session._single.pointer, adapters, 1, scales) == 0
    logits = session.prefill(IDS)
    session.close()
    return logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_llamacpp_with_the_adapter_predicts_what_torch_with_it_predicts(family: str, tmp_path: Path) -> None:
    base = write_tiny(family, tmp_path / "base")
    adapted = adapt(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(torch.tensor([IDS])).logits[0, -1].numpy()
    write_gguf(base, tmp_path / "base.gguf", "f32")
    matrices = write_lora(tmp_path / "adapter/adapter_model.safetensors", 6 / 4, base, tmp_path / "lora.gguf")
    assert matrices == 7 * adapted.config.num_hidden_layers
    found = llamacpp_logits(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    rounding = 2e-3 if "gemma" in family else 2e-4  # ggml looks Gemma's activation up in a table of f16
    np.testing.assert_allclose(found, expected, atol=rounding * np.abs(expected).max())
    without = llamacpp_logits(tmp_path / "base.gguf", None)
    assert np.abs(without - expected).max() > 0.05 * np.abs(expected).max()


def test_the_file_says_that_it_is_an_adapter(tmp_path: Path) -> None:
    base = write_tiny("llama", tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    write_lora(tmp_path / "adapter/adapter_model.safetensors", 1.5, base, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    found = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert found == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [96, 4]
    assert shapes["blk.0.ffn_down.weight.lora_b"] == [4, 64]


def test_what_is_no_pair_for_a_matrix_of_the_base_is_refused_by_name(tmp_path: Path) -> None:
    base = write_tiny("llama", tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    alien = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
    for extra in (alien, "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"):
        save_file({**tensors, extra: torch.ones(4, 64)}, path)
        with pytest.raises(ModelError, match=extra.rpartition(".")[0]):
            write_lora(path, 1.5, base, tmp_path / "lora.gguf")
