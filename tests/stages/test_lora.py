"""The adapter on its own, as llama.cpp reads it: with the base's GGUF it is the merged model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.export.sabotage import World
from benchmarks.export.ways_merge import adapter_of
from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.formats.gguf import write_gguf
from edgeft.formats.hf import load_model, save_model
from edgeft.plan import LoraNode
from edgeft.progress import Reporter
from edgeft.stages import lora
from edgeft.tune.methods import merge_learned

SOURCE = "somebody/tiny-instruct"
MATRICES = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(world: World) -> Artifact:
    metrics = {"source": SOURCE}
    write_manifest(world.model, Manifest("model", "base", "0" * 16, {}, {}, scan_files(world.model), metrics))
    return open_artifact(world.model)


def run(base: Artifact, learned: Artifact, out: Path) -> tuple[dict[str, Any], str]:
    out.mkdir()
    said = io.StringIO()
    return lora.run(LoraNode(), {"model": base, "adapter": learned}, out, Reporter("lora", out, said)), said.getvalue()


def tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)], ids=["lora", "rslora"])
def test_the_base_with_the_adapters_product_is_the_merged_model(
    rslora: bool, scale: float, world: World, base: Artifact, tmp_path: Path
) -> None:
    learned = adapter_of(world, tmp_path, rslora=rslora)
    found, said = run(base, learned, tmp_path / "out")
    file = tmp_path / "out" / lora.FILE
    assert found == {"matrices": 4 * len(MATRICES), "scale": scale, "bytes": file.stat().st_size}
    assert "28 matrices: llama-cli -m BASE.gguf --lora adapter.gguf" in said
    fields = gguf.GGUFReader(file).fields
    says = {key: fields[key].contents() for key in fields if key.startswith(("general.", "adapter."))}
    assert says == {
        "general.architecture": "llama", "general.type": "adapter", "general.base_model.count": 1,
        "general.base_model.0.name": SOURCE, "adapter.type": "lora", "adapter.lora.alpha": scale * 4,
    }  # fmt: skip

    model: Any = load_model(base.path, torch.float32)
    merge_learned(model, learned, "original")
    save_model(model, tmp_path / "merged", base.path)
    for folder, name in ((base.path, "base.gguf"), (tmp_path / "merged", "merged.gguf")):
        write_gguf(folder, tmp_path / name, "f32")
    pairs, before, after = tensors(file), tensors(tmp_path / "base.gguf"), tensors(tmp_path / "merged.gguf")
    matrices = {f"blk.{layer}.{matrix}.weight" for layer in range(4) for matrix in MATRICES}
    assert pairs.keys() == {f"{name}.{side}" for name in matrices for side in ("lora_a", "lora_b")}
    for name in after:
        expected = before[name]
        if name in matrices:
            a_RI, b_OR = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            assert np.abs(b_OR @ a_RI).max() > 0.01
            expected = expected + says["adapter.lora.alpha"] / len(a_RI) * b_OR @ a_RI
        np.testing.assert_allclose(after[name], expected, atol=1e-5, err_msg=name)
