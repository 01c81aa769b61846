from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_file
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeft.cli import main
from edgeft.errors import ArtifactError
from edgeft.formats import gguf, gguf_quant, onnx, onnx_quant
from edgeft.formats.diff import Diff, allowed_error, diff, model_order, relative_error
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.sides import Tensor, open_side
from tests.formats.tiny_family import write_tiny
from tests.formats.tiny_model import LAYERS, tiny_onnx, write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("diff") / "model")


def altered(model: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A copy with other weights: name -> function of the old ones."""
    write_tiny_llama(out)
    weights = load_file(model / "model.safetensors")
    save_file({n: changes[n](w) if n in changes else w for n, w in weights.items()}, out / "model.safetensors")
    return out


@cache
def family_onnx(folder: Path, family: str) -> tuple[Path, Path]:
    """A model of another architecture and its package, read only."""
    model, package = write_tiny(family, folder / family), folder / f"{family}-onnx"
    onnx.build_onnx(model, package)
    return model, package


def parts(found: Diff) -> str:
    return "\n".join(line for lines in found.parts().values() for line in lines)


def test_a_model_equals_itself_and_its_packages_in_every_type(model: Path, tmp_path: Path) -> None:
    gguf.write_gguf(model, tmp_path / "model.gguf", "f32")
    assert diff(model, model).equal
    found = diff(model, tmp_path)
    assert found.equal and len(found.tensors) == 2 + 9 * LAYERS and len(found.layers) == LAYERS
    assert max(gap.error for gap in found.tensors) == 0 and max(gap.error for gap in found.layers) < 1e-6
    for quant in ("q8_0", "q4_0"):
        gguf_quant.quantize(tmp_path / "model.gguf", tmp_path / f"{quant}.gguf", quant, 1)
        found = diff(model, tmp_path / f"{quant}.gguf")
        assert found.equal and max(gap.error for gap in found.tensors) > 1e-3
    assert diff(tmp_path / "q8_0.gguf", tmp_path / "q4_0.gguf").equal


def test_onnx_packages_equal_their_model_in_every_precision(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    assert diff(model, package).equal
    for scheme in (Scheme(8), Scheme(4), Scheme(4, 16, zero_points=True)):
        out = tmp_path / str(scheme)
        out.mkdir()
        onnx.copy_companions(package, out)
        onnx_quant.quantize_graph(package / "model.onnx", out / "model.onnx", scheme)
        found = diff(model, out)
        assert found.equal and len(found.tensors) == 3 + 9 * LAYERS, parts(found)  # the head has a product of its own
        assert max(gap.error for gap in found.tensors) > 1e-3


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama3", "model.layers.1.self_attn.k_proj.bias"),
        ("llama3", "model.layers.2.self_attn.o_proj.bias"),
        ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"),  # stored as what it adds to 1
    ],
)
def test_biases_and_norms_of_other_architectures_are_compared(
    family: str, name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, package = family_onnx(tmp_path_factory.getbasetemp(), family)
    assert diff(model, package).equal
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({**weights, name: weights[name] * np.float32(1.5)}, other / "model.safetensors")
    assert [gap.name for gap in diff(other, package).tensors if gap.parts] == [name]


def test_the_first_and_the_worst_tensor_and_the_first_layer_are_named(model: Path, tmp_path: Path) -> None:
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    changes = {names[0]: lambda w: w * np.float32(1.5), names[1]: lambda w: -w}
    found = diff(model, altered(model, tmp_path, changes))
    assert not found.equal
    assert found.parts() == {
        "settings": [],
        "38 tensors": [
            f"2 differ, the first is {names[0]} (F32): 0.5 of its size, 2e-06 allowed",
            f"the worst is {names[1]} (F32): 2 of its size, 2e-06 allowed",
        ],
        "4 layers": found.parts()["4 layers"],
    }
    assert found.parts()["4 layers"][0].startswith("2 differ, the first is model.layers.1:")


def test_another_rope_theta_parts_the_layers_though_all_tensors_are_equal(model: Path, tmp_path: Path) -> None:
    gguf.write_gguf(model, tmp_path / "model.gguf", "f32")
    field = gguf_file.GGUFReader(tmp_path / "model.gguf", "r+").get_field("llama.rope.freq_base")
    field.parts[field.data[0]][0] = 100.0  # type: ignore[union-attr]
    found = diff(model, tmp_path)
    assert found.parts()["settings"] == ["rope theta: 5000 in A, 100 in B"]
    assert not found.parts()["38 tensors"]
    assert found.parts()["4 layers"][0].startswith("4 differ, the first is model.layers.0:")


def test_other_tokens_and_templates_are_shown_where_they_differ(model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other")
    (other / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text().replace("assistant", "bot"))
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["e"], vocab["r"] = vocab["r"], vocab["e"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    found = {gap.name: gap for gap in diff(model, other, layers=False).facts}
    assert found.keys() == {"chat template", "tokens"}
    assert "assistant" in found["chat template"].a and "bot" in found["chat template"].b
    assert {found["tokens"].a.split()[0], found["tokens"].b.split()[0]} == {"'e'", "'r'"}


def test_a_head_of_its_own_that_equals_the_embedding_is_no_difference(model: Path, tmp_path: Path) -> None:
    untied = write_tiny_llama(tmp_path / "untied", tie=False)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, untied / "model.safetensors")
    assert diff(model, untied).equal
    weights["lm_head.weight"] = np.roll(weights["lm_head.weight"], 1, axis=0)
    save_file(weights, untied / "model.safetensors")
    assert "lm_head.weight" in parts(diff(model, untied))


def test_tensors_of_one_side_only_are_named(model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors")
    assert "of one side only: model.layers.2.mlp.up_proj.weight" in parts(diff(model, other))


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no model"):
        open_side(tmp_path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_normal_weights_stay_within_what_their_type_allows_by_less_than_ten_times(kind: str) -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
    to = gguf_file.GGMLQuantizationType[kind]
    error = relative_error(weights, gguf_file.dequantize(gguf_file.quantize(weights, to), to))
    allowed = allowed_error(Tensor("F32", lambda: weights), Tensor(kind, lambda: weights))
    assert allowed / 10 < error < allowed


def test_a_value_that_is_not_finite_or_another_shape_is_the_largest_difference() -> None:
    ones = np.ones((2, 2), np.float32)
    for other in (np.full((2, 2), np.nan, np.float32), np.ones((2, 3), np.float32)):
        assert relative_error(ones, other) == math.inf
    assert relative_error(ones * 0, ones * 0) == 0


def test_tensors_come_in_the_order_of_the_model() -> None:
    names = [
        "lm_head.weight",
        "model.layers.10.a",
        "model.norm.weight",
        "model.layers.2.a",
        "model.embed_tokens.weight",
    ]
    assert sorted(names, key=model_order) == [names[4], names[3], names[1], names[2], names[0]]


def test_the_command_shows_what_differs_and_what_both_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    other = altered(model, tmp_path / "other", {name: lambda w: -w})
    (tmp_path / "package").mkdir()
    gguf.write_gguf(other, tmp_path / "package" / "model.gguf", "f16")
    turns = [{"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "Here."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    command = ["diff", str(model), str(tmp_path / "package")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--row", f"{tmp_path / 'rows.jsonl'}:1"])
    shown = capsys.readouterr().out
    assert stop.value.code == 1
    assert f"1 differ, the first is {name} (F32, F16)" in shown
    assert "question: Where is my order?" in shown and "they part at: token" in shown
    with pytest.raises(SystemExit) as stop:
        main([*command, "--row", f"{tmp_path / 'rows.jsonl'}:2"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["diff", str(other), str(tmp_path / "package")])
    assert stop.value.code == 0
