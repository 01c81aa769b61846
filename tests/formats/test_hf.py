"""Model folders written and read again; the real model against transformers' own GGUF reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgeft.artifact import file_sha256
from edgeft.errors import ModelError
from edgeft.formats import hf
from tests.formats.tiny_gguf import write_gguf
from tests.real_model import smollm2_gguf
from tests.text.tiny import write_tokenizer

CLEAN = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it, with tied embeddings in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=50000.0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    return write_tokenizer(tmp_path / "tiny")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.float()


@pytest.mark.slow
def test_the_real_checkpoint_equals_transformers_reading_of_the_same_file(smollm2: Path) -> None:
    from transformers import GgufConfig

    path = smollm2_gguf()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model = hf.load_model(smollm2)
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), logits(reference))


def test_a_gguf_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    hf.gguf_to_checkpoint(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == CLEAN
    model = hf.load_model(tmp_path / "out")
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "again")  # a GGUF quantiser left behind would refuse this


def test_saving_keeps_logits_type_and_tied_embeddings(tiny: Path, tmp_path: Path) -> None:
    model = hf.load_model(tiny)
    assert model.dtype == torch.bfloat16
    hf.save_model(model, tmp_path / "out", tiny)
    again = hf.load_model(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(again))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert hf.count_parameters(tmp_path / "out") == model.num_parameters()


def test_both_generations_of_readers_find_rope_theta_and_tokenizer(tiny: Path, tmp_path: Path) -> None:
    assert "rope_theta" not in json.loads((tiny / "config.json").read_text())  # the trap: transformers 5 leaves it out
    hf.save_model(hf.load_model(tiny), tmp_path / "out", tiny)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == CLEAN


def test_saving_twice_gives_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    hf.save_model(hf.load_model(tiny), tmp_path / "a", tiny)
    hf.save_model(hf.load_model(tmp_path / "a"), tmp_path / "b", tmp_path / "a")
    assert {n: file_sha256(tmp_path / "a" / n) for n in CLEAN} == {n: file_sha256(tmp_path / "b" / n) for n in CLEAN}


def test_the_older_rope_setting_is_completed_for_newer_readers() -> None:
    assert hf.clean_config({"rope_theta": 5.0})["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}
    scaled = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    assert hf.clean_config(scaled)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "quantization_config" not in hf.clean_config({"quantization_config": {}, "auto_map": {}})


def test_a_model_with_an_adapter_in_it_is_not_saved(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hf.load_model(tiny), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ModelError, match="not plain: it still holds .*lora"):
        hf.save_model(model, tmp_path / "out", tiny)


def test_pickle_checkpoints_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickle \(pytorch_model\.bin\)"):
        hf.load_model(tiny)


def test_tensors_that_are_missing_are_named_instead_of_filled_at_random(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"9 tensors are missing .*model\.layers\.2"):
        hf.load_model(tiny)


def test_tensors_of_another_shape_are_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ModelError):
        hf.load_model(tiny)


def test_quantised_checkpoints_are_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="already quantised"):
        hf.load_model(tiny)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_missing_file_is_named(tiny: Path, tmp_path: Path, name: str) -> None:
    (tiny / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        hf.save_model(hf.load_model(tiny), tmp_path / "out", tiny)


def test_a_damaged_weight_file_is_refused(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        hf.load_model(tiny)


def test_code_in_a_checkpoint_is_never_run(tiny: Path) -> None:
    marker = tiny / "ran"
    (tiny / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((tiny / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    }
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded"):
        hf.load_model(tiny)
    assert not marker.exists()


def test_a_missing_generation_config_is_made_from_the_config(tiny: Path, tmp_path: Path) -> None:
    (tiny / "generation_config.json").unlink()
    hf.save_model(hf.load_model(tiny), tmp_path / "out", tiny)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    shutil.rmtree(tmp_path / "out")
