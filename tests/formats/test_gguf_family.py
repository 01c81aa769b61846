"""Every architecture: what llama.cpp's own converter writes, and what torch predicts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.formats.gguf import ROPE_FACTORS, write_gguf
from edgeft.formats.gguf_vocab import SENTENCEPIECE
from edgeft.text.chat import ChatTokenizer
from tests.formats.llama_cpp_converter import convert
from tests.formats.tiny_family import FAMILY, write_tiny
from tests.formats.tiny_model import TEXTS

# sha256 over (name, type, shape, bytes) of the tensors in the bf16 files that llama.cpp's converter writes; a slow test
# below compares them with the converter itself.
GOLDEN = {
    "llama": "6b72e7f588b5b595d210d384fee5128609dcf6544b223b55a5211bb9c23e184d",
    "llama3": "9cbd00c1f31694b284d79b376742fd79d7ede348e1b69524e816f312c4e154fe",
    "mistral": "63f30348979e4d3e642685db419fc7524c3a0d866d4c02b8b20276c2f80c8ae1",
    "qwen2": "f4a7fc8668d44f8e61f75364471e6daf18e98cf9b4b674fd066c1e5907037638",
    "qwen3": "4f5e82e6295de6992b1f6a6e5b33a0f03b5b7d1a10162ba759952f31a3f1353d",
    "smollm3": "6b72e7f588b5b595d210d384fee5128609dcf6544b223b55a5211bb9c23e184d",
    "gemma2": "285f071751366e37e4491587c81a880f31c7dfbffc63322b25ba0283fece68d3",
    "gemma3": "d9a4d7c0bdafaeb45145bb101864c3d548726265de1a7c73fd583cb9192ee857",
}
# What edgeft writes on purpose, or the converter guesses from the folder's name and its own reading of the tokenizer.
OWN = {
    "gemma2.rope.freq_base",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
}
GUESSED = ("general.name", "general.size_label", "general.basename", "general.sampling", "GGUF.")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    return {family: write_tiny(family, folder / family) for family in FAMILY}


def digest(path: Path) -> str:
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        if tensor.name == ROPE_FACTORS:  # computed, not stored: torch's powers differ from numpy's in the last digit
            continue
        found.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}\n".encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()


def factors(path: Path) -> list[float]:
    return [float(x) for t in gguf.GGUFReader(path).tensors if t.name == ROPE_FACTORS for x in t.data]


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith(GUESSED)}


@pytest.mark.parametrize("family", FAMILY)
def test_tensors_are_those_of_llamacpps_converter(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(models[family], tmp_path / "model.gguf", "bf16")
    assert digest(tmp_path / "model.gguf") == GOLDEN[family]


@pytest.mark.parametrize("family", FAMILY)
def test_f32_predicts_what_torch_predicts(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(models[family], tmp_path / "model.gguf", "f32")
    ids = ChatTokenizer.from_folder(models[family]).encode_text(" ".join(TEXTS))[:40]
    torch_model = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    with torch.no_grad():
        expected = torch_model(torch.tensor([ids])).logits[0].numpy()
    session = LlamaCppSession(tmp_path / "model.gguf", 1, 256, "f32")
    (found,) = session.score([(ids, range(len(ids)))])
    session.close()
    rounding = 2e-3 if "gemma" in family else 2e-4  # ggml looks Gemma's activation up in a table of f16
    np.testing.assert_allclose(found, expected, atol=rounding * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILY)
def test_llamacpp_gives_the_same_token_ids(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(models[family], tmp_path / "model.gguf", "bf16")
    chat, session = ChatTokenizer.from_folder(models[family]), LlamaCppSession(tmp_path / "model.gguf", 1, 64)
    for text in (
        *TEXTS,
        " then  the\nthere",
        "x=2024\n\n  <|im_end|> 你好 👩‍💻\tdon't I'LL",
        "",
        "\u00a0  ",
        "Order the ORDER",
    ):
        messages = [{"role": "user", "content": text}]
        assert session.prompt_ids(messages) == chat.prompt_ids(messages)
        assert session.answer_ids(text) == chat.answer_ids(text)
    assert session.stop_ids >= chat.stop_ids
    session.close()


@pytest.mark.slow
def test_llamacpps_converter_writes_the_same_tensors_and_metadata(models: dict[str, Path], tmp_path: Path) -> None:
    jobs = [(models[f], tmp_path / f"{f}.gguf", "bf16", FAMILY[f][2]) for f in FAMILY]
    convert(jobs)
    for family in FAMILY:
        theirs = tmp_path / f"{family}.gguf"
        assert digest(theirs) == GOLDEN[family], family
        write_gguf(models[family], tmp_path / "ours.gguf", "bf16")
        np.testing.assert_allclose(factors(tmp_path / "ours.gguf"), factors(theirs), rtol=1e-6)
        same_metadata(tmp_path / "ours.gguf", theirs, vocabulary=FAMILY[family][2] != SENTENCEPIECE)


@pytest.mark.slow
def test_llamacpps_converter_writes_the_same_smollm2(smollm2: Path, tmp_path: Path) -> None:
    convert([(smollm2, tmp_path / "theirs.gguf", "f16", "smollm")])
    write_gguf(smollm2, tmp_path / "ours.gguf", "f16")
    assert digest(tmp_path / "ours.gguf") == digest(tmp_path / "theirs.gguf")
    same_metadata(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", vocabulary=True)


def same_metadata(ours: Path, theirs: Path, vocabulary: bool) -> None:
    found, expected = metadata(ours), metadata(theirs)
    for key, value in expected.items():
        if vocabulary or not key.startswith("tokenizer."):
            assert found[key] == value, key
    extra = {key for key in found.keys() - expected.keys() if vocabulary or not key.startswith("tokenizer.")}
    assert extra <= OWN
