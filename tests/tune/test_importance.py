from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeft.errors import ModelError
from edgeft.formats.hf import load_model
from edgeft.formats.importance import load_importance
from edgeft.plan import ImportanceNode
from edgeft.progress import Reporter
from edgeft.stages import importance as stage
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, encode_row
from edgeft.tune.batches import trained_positions
from edgeft.tune.importance import mean_input_squares
from tests.formats.tiny_model import TEXTS, write_tiny_llama
from tests.stages.test_export import finish


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]


def rows(model: Path) -> list[Encoded]:
    chat = ChatTokenizer.from_folder(model)
    return [encode_row(chat, messages(text), 512, "row") for text in TEXTS]


def test_the_mean_is_over_all_tokens_and_of_the_head_over_answers(model: Path) -> None:
    torch_model, encoded = load_model(model, torch.float32), rows(model)
    hidden = [torch_model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states for row in encoded]
    after = [states[-1][0, trained_positions(row)] for states, row in zip(hidden, encoded, strict=True)]
    norm = torch_model.model.layers[0].input_layernorm
    before = [norm(states[0])[0] for states in hidden]
    found = mean_input_squares(torch_model, encoded)
    for name, expected in (("lm_head", after), ("model.layers.0.self_attn.q_proj", before)):
        mean = torch.cat(expected).square().mean(0).detach().numpy()
        np.testing.assert_allclose(found[f"{name}.weight"], mean, rtol=1e-4)
    assert len(found) == 4 * 7 + 1
    assert not any(module._forward_pre_hooks for module in torch_model.modules())


def test_a_broken_model_is_an_error_that_names_the_matrix(model: Path) -> None:
    torch_model = load_model(model, torch.float32)
    torch.nn.init.constant_(torch_model.model.layers[1].self_attn.v_proj.weight, float("inf"))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.o_proj"):
        mean_input_squares(torch_model, rows(model))


def test_the_stage_writes_the_same_for_the_same_seed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"messages": messages(f"{text} {n}")}) for n in range(3) for text in TEXTS]
    (tmp_path / "data/train.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    inputs = {"model": finish(folder, "model"), "dataset": finish(tmp_path / "data", "dataset")}
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        node = ImportanceNode(rows=5, max_tokens=512, seed=seed)
        metrics = stage.run(node, inputs, tmp_path / name, Reporter("importance", tmp_path / name))
        assert (metrics["rows"], metrics["matrices"]) == (5, 29)
        found.append(load_importance(tmp_path / name)["lm_head.weight"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
