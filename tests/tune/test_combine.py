"""Several adapters become the one that PEFT makes of them; contradictions are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.export.sabotage import World
from benchmarks.export.ways_merge import adapter_of
from edgeft.artifact import Artifact, Manifest
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model
from edgeft.learning_settings import MergeSettings, OtherAdapter
from edgeft.progress import Reporter
from edgeft.tune.combine import combine_adapters
from edgeft.tune.methods import ADAPTER, merge_learned

LINEAR = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def adapters(world: World, folder: Path) -> tuple[Artifact, Path]:
    """One that was trained, and another on the same layers."""
    learned = adapter_of(world, folder)
    second = folder / "second"
    second.mkdir()
    other = adapter_of(world, second, rank=6, alpha=3).path
    torch.manual_seed(5)
    values = {name: torch.randn_like(value) * 0.1 for name, value in load_file(other / ADAPTER).items()}
    save_file(values, other / ADAPTER, metadata={"format": "pt"})
    return learned, other


def combined(world: World, learned: Artifact, cfg: MergeSettings, out: Path) -> tuple[Any, dict[str, Any]]:
    """The base with the combination in it, and what was said of the adapters."""
    out.mkdir(exist_ok=True)
    base = Artifact(world.model, Manifest("model", "base", "0" * 16, {}, {}, {}))
    made, found = combine_adapters(base, learned, cfg, out, Reporter("merge"))
    model: Any = load_model(world.model, torch.float32)
    merge_learned(model, made, "original")
    return model, found["combined"]


def update(world: World, folder: Path) -> torch.Tensor:
    """What PEFT makes of one adapter's update of a weight."""
    model = PeftModel.from_pretrained(load_model(world.model, torch.float32), str(folder))
    delta: torch.Tensor = model.get_base_model().get_submodule(LINEAR[: -len(".weight")]).get_delta_weight("default")
    return delta.detach()


def test_linear_adds_the_updates_whatever_their_ranks(world: World, tmp_path: Path) -> None:
    learned, other = adapters(world, tmp_path)
    cfg = MergeSettings(adapters=(OtherAdapter(adapter=str(other), weight=-0.5),))
    model, found = combined(world, learned, cfg, tmp_path / "out")
    expected = load_model(world.model, torch.float32).state_dict()[LINEAR]
    expected = expected + update(world, learned.path) - 0.5 * update(world, other)
    torch.testing.assert_close(model.state_dict()[LINEAR], expected, atol=1e-5, rtol=1e-5)
    assert found["rank"] == 10 and found["adapters"][0]["weight"] == -0.5


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_ties_and_dare_are_pefts_own(how: str, world: World, tmp_path: Path) -> None:
    learned, other = adapters(world, tmp_path)
    cfg = MergeSettings(adapters=(OtherAdapter(adapter=str(other)),), combine=how, density=0.3)  # type: ignore[arg-type]
    model, _ = combined(world, learned, cfg, tmp_path / "out")
    theirs: Any = PeftModel.from_pretrained(load_model(world.model, torch.float32), str(learned.path), "a")
    theirs.load_adapter(str(other), "b")
    torch.manual_seed(0)
    theirs.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", f"{how}_svd", svd_rank=10, density=0.3)
    theirs.set_adapter("c")
    expected = theirs.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_conflicts_are_counted_over_the_large_entries(world: World, tmp_path: Path) -> None:
    learned, other = adapters(world, tmp_path)
    values = load_file(learned.path / ADAPTER)
    against = {name: -2 * value if "lora_B" in name else value for name, value in values.items()}
    (other / "adapter_config.json").write_text((learned.path / "adapter_config.json").read_text())
    save_file(against, other / ADAPTER, metadata={"format": "pt"})
    cfg = MergeSettings(adapters=(OtherAdapter(adapter=str(other)), OtherAdapter(adapter=str(learned.path))))
    _, found = combined(world, learned, cfg, tmp_path / "out")
    opposite, same = found["adapters"]
    assert (opposite["opposed"], same["opposed"]) == (1.0, 0.0)
    assert opposite["size"] == pytest.approx(2, rel=1e-4) and opposite["cosine"] == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_model_name_or_path": f"sha256:{'f' * 64}"}, "was trained on base ffff"),
        ({"use_dora": True}, "no plain LoRA adapter"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_adapters_that_do_not_go_together_are_refused(
    changes: dict[str, Any], named: str, world: World, tmp_path: Path
) -> None:
    learned, other = adapters(world, tmp_path)
    path = other / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=named):
        combined(world, learned, MergeSettings(adapters=(OtherAdapter(adapter=str(other)),)), tmp_path / "out")


def test_an_adapter_on_other_layers_is_refused(world: World, tmp_path: Path) -> None:
    learned, _ = adapters(world, tmp_path)
    (tmp_path / "third").mkdir()
    other = adapter_of(world, tmp_path / "third", last_layers=1)
    with pytest.raises(ModelError, match="on other layers"):
        combined(world, learned, MergeSettings(adapters=(OtherAdapter(adapter=str(other.path)),)), tmp_path / "out")
