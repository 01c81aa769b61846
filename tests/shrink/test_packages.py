"""A student cut in width is exported as exactly as any other model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edgeft.bench.session import open_session
from edgeft.formats.gguf import write_gguf
from edgeft.formats.hf import load_model, read_config, save_model
from edgeft.formats.onnx import build_onnx
from edgeft.formats.parity import Parity, compare
from edgeft.shrink.importance import ffn_importance, group_importance, hidden_importance, norm_factors
from edgeft.shrink.width import keep_ffn, keep_groups, keep_hidden, loadable, strongest
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import encode_text
from edgeft.tune.batches import collate
from tests.formats.tiny_model import TEXTS, make_probe, write_tiny_llama


def cut(folder: Path, groups: int, hidden: int) -> Path:
    """The folder of a tiny Llama (2 key-value heads of 16, hidden size 64) cut to these sizes, feed-forwards to 64."""
    teacher = write_tiny_llama(folder / "teacher")
    chat, model = ChatTokenizer.from_folder(teacher), load_model(teacher, torch.float32)
    rows = [collate([encode_text(chat, text) for text in TEXTS], chat.pad_id)]
    model = keep_groups(model, strongest(group_importance(model, rows), groups).kept)
    model = keep_ffn(model, strongest(ffn_importance(model, rows), 64).kept)
    (kept,) = strongest([hidden_importance(model, rows)], hidden).kept
    model = loadable(keep_hidden(model, kept, norm_factors(model, rows, torch.tensor(kept))))
    save_model(model, folder / "student", teacher)
    return folder / "student"


def parity(package: Path, model: Path) -> Parity:
    probe = make_probe(model, TEXTS)
    session = open_session(package, threads=1, context=256)
    scored = list(session.score(list(zip(probe.rows, probe.positions, strict=True))))
    session.close()
    return compare(probe.logits_PV, np.concatenate(scored), probe.next_ids())


@pytest.mark.parametrize(
    ("groups", "hidden", "kind"), [(1, 48, "LlamaForCausalLM"), (2, 50, "MistralForCausalLM")], ids=["llama", "mistral"]
)
def test_a_narrow_student_predicts_in_gguf_what_it_does_in_torch(
    groups: int, hidden: int, kind: str, tmp_path: Path
) -> None:
    model = cut(tmp_path, groups, hidden)
    assert read_config(model)["architectures"] == [kind] and read_config(model)["head_dim"] == 16
    (tmp_path / "package").mkdir()
    write_gguf(model, tmp_path / "package/model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "package/model.gguf").fields
    expected = {
        "embedding_length": hidden, "feed_forward_length": 64, "attention.head_count": 2 * groups,
        "attention.head_count_kv": groups, "attention.key_length": 16, "attention.value_length": 16,
        "rope.dimension_count": 16,
    }  # fmt: skip
    assert {key: fields[f"llama.{key}"].contents() for key in expected} == expected
    found = parity(tmp_path / "package", model)
    assert found.kl_mean < 1e-4 and found.top1 == 1.0  # the runtime keeps keys and values in f16


def test_a_narrow_student_predicts_in_onnx_what_it_does_in_torch(tmp_path: Path) -> None:
    model = cut(tmp_path, 2, 50)
    build_onnx(model, tmp_path / "package")
    found = parity(tmp_path / "package", model)
    assert found.kl_max < 1e-6 and found.top1 == 1.0
