"""Ways to break a merge: the adapter's orientation, scale, names, base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from benchmarks.export.sabotage import World, way
from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.export_settings import ExportSettings
from edgeft.formats.hf import load_model, save_model
from edgeft.learning_settings import TrainSettings
from edgeft.plan import MergeNode
from edgeft.progress import Reporter
from edgeft.stages import merge
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import encode_row
from edgeft.tune import methods
from edgeft.tune.fold_check import check_fold
from edgeft.tune.precision import Compute

FOLD = r"the adapter folded into the weights is not the adapter beside them"
RESULT = r"the merged model is not the one that was trained(.|\n)+the worst is model"
MERGED = ExportSettings().max_kl["merged"]


def adapter_of(world: World, out: Path, **settings: Any) -> Artifact:
    """An adapter of random values, as the train stage leaves it."""
    cfg = TrainSettings(**{"method": "lora", "rank": 4, "alpha": 12, **settings})
    model = load_model(world.model, torch.float32)
    learner = methods.make_learner(model, cfg, Compute(torch.device("cpu"), torch.float32, {}), 64)
    torch.manual_seed(0)
    weights = {
        name: torch.randn_like(p) * 0.2 if "lora_" in name else p.detach()
        for name, p in learner.trained.named_parameters()
        if p.requires_grad
    }
    folder = out / "adapter"
    folder.mkdir()
    methods.save_learned(learner, cfg, weights, "base", folder)
    return artifact(folder, cfg.model_dump(mode="json"))


def artifact(folder: Path, config: dict[str, Any], base: str = "") -> Artifact:
    write_manifest(folder, Manifest("adapter", "train", "0" * 16, config, {"model": base}, scan_files(folder)))
    return open_artifact(folder)


def folded(world: World, learned: Artifact, merged: Path | None = None) -> None:
    """What the merge stage does when it has written the merged model; by default the base itself was written."""
    chat = ChatTokenizer.from_folder(world.model)
    turns = [{"role": "user", "content": "Where is my order 12345?"}, {"role": "assistant", "content": "It is here."}]
    rows = [encode_row(chat, turns, 256, "row")]
    check_fold(world.model, learned, "dequantized", merged or world.model, rows, MERGED)


def with_fold(world: World, learned: Artifact, fold: Callable[..., Any]) -> None:
    with patch.object(methods, "fold_adapter", fold):
        folded(world, learned)


@way("transposed LoRA", "merge", FOLD)
def transposed_lora(world: World, out: Path) -> None:
    real = methods.fold_adapter

    def fold(model: Any, adapter: Mapping[str, torch.Tensor], *rest: Any) -> Any:
        square = {name for name in adapter if "q_proj" in name or "o_proj" in name}
        turned = dict(adapter)
        for name in (name for name in square if "lora_A" in name):
            other = name.replace("lora_A", "lora_B")
            turned[name], turned[other] = adapter[other].t(), adapter[name].t()
        return real(model, turned, *rest)

    with_fold(world, adapter_of(world, out), fold)


@way("unscaled LoRA", "merge", FOLD)
def unscaled_lora(world: World, out: Path) -> None:
    real = methods.fold_adapter

    def fold(model: Any, adapter: Any, scale: float, *rest: Any) -> Any:
        return real(model, adapter, 1.0, *rest)

    with_fold(world, adapter_of(world, out), fold)


@way("adapter that is never added", "merge", FOLD)
def no_lora(world: World, out: Path) -> None:
    with_fold(world, adapter_of(world, out), lambda *given: {"tensors_folded": 0, "max_abs_update": 0.0})


@way("DoRA's lengths left out", "merge", FOLD)
def no_magnitudes(world: World, out: Path) -> None:
    real = methods.fold_adapter

    def fold(model: Any, adapter: Mapping[str, torch.Tensor], *rest: Any) -> Any:
        return real(model, {k: v for k, v in adapter.items() if "magnitude" not in k}, *rest)

    with_fold(world, adapter_of(world, out, dora=True), fold)


@way("merged layers in another order", "merge", RESULT)
def exchanged_layers(world: World, out: Path) -> None:
    learned = adapter_of(world, out)
    model: Any = load_model(world.model, torch.float32)
    methods.merge_learned(model, learned, methods.DEQUANTIZED)
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    save_model(model, out / "merged", world.model)
    folded(world, learned, out / "merged")


@way("adapter of another base", "merge", r"the adapter was trained on base")
def another_base(world: World, out: Path) -> None:
    learned = artifact(adapter_of(world, out).path, {}, base="f" * 64)
    base = Artifact(world.model, Manifest("model", "base", "0" * 16, {}, {}, {}))
    merge.run(MergeNode(max_kl=MERGED), {"model": base, "adapter": learned}, out, Reporter("merge"))


@way("adapter with layers missing", "merge", r"the adapter does not fit the model")
def missing_layers(world: World, out: Path) -> None:
    learned = adapter_of(world, out)
    path = learned.path / methods.ADAPTER
    kept = {name: value for name, value in load_file(path).items() if "layers.2." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    folded(world, learned)
