"""What of a model learns: an adapter or its own weights, everywhere or in the last layers; and how that is merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from edgeft.artifact import Artifact
from edgeft.errors import ModelError
from edgeft.learning_settings import TrainSettings
from edgeft.tune.precision import Compute, place
from edgeft.tune.qlora import (
    FourBits,
    Packed,
    Pair,
    adapter_config,
    adapter_targets,
    adapter_tensors,
    add_adapter,
    decoder_linears,
    dequantized_base,
    fold_adapter,
    load_4bit,
)

ADAPTER, WEIGHTS, SUBTRACTED = "adapter_model.safetensors", "weights.safetensors", "subtracted.safetensors"
LOFTQ_ROUNDS = 5  # as in the paper's experiments
DEQUANTIZED, ORIGINAL = "dequantized", "original"
Into = str | Sequence[str]  # one of these for all decoder layers, or one for each
SVD_ITERATIONS = 8  # of the randomised decomposition (Halko et al. 2011, arXiv:0909.4061)


@dataclass(frozen=True)
class Learner:
    """A model made ready to learn. `trained` holds the weights that change; `model` computes."""

    trained: Any
    model: Any
    subtracted: dict[str, Pair] = field(default_factory=dict)  # taken from the base, as the adapter starts with it


def make_learner(model: Any, cfg: TrainSettings, compute: Compute, longest: int) -> Learner:
    """From a float32 model; `longest` is the longest row in tokens. Raises RecipeError for what the model lacks."""
    model.requires_grad_(False)
    if cfg.method == "full":
        place(model, compute, longest)
        for part in [model] if cfg.last_layers is None else model.get_decoder().layers[-cfg.last_layers :]:
            part.requires_grad_(True)
        return Learner(model, model)
    targets = adapter_targets(model, cfg.target_modules, cfg.last_layers)
    start, subtracted = _start(model, cfg, targets)
    _subtract(model, subtracted, cfg.scale)
    packed: Mapping[str, Packed] = {}
    if cfg.method == "qlora":
        model, packed = load_4bit(model, _four_bits(cfg), compute)
    adapted = add_adapter(place(model, compute, longest), cfg, targets, start, packed).to(compute.dtype)
    return Learner(adapted, adapted.get_base_model(), subtracted)


def save_learned(
    learner: Learner, cfg: TrainSettings, weights: Mapping[str, torch.Tensor], base: str, out: Path
) -> None:
    """Write what was learned, float32: an adapter in PEFT's layout, or the weights by name."""
    if cfg.method == "full":
        save_file({name: value.contiguous() for name, value in weights.items()}, out / WEIGHTS)
        return
    save_file(adapter_tensors(learner.trained, dict(weights)), out / ADAPTER, metadata={"format": "pt"})
    settings = adapter_config(learner.trained, base)
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), "utf-8")
    if learner.subtracted:
        pairs = learner.subtracted.items()
        named = {
            f"{name}.{side}": value.contiguous() for name, pair in pairs for side, value in zip("AB", pair, strict=True)
        }
        save_file(named, out / SUBTRACTED)


def merge_learned(model: Any, learned: Artifact, into: Into, strength: float = 1.0) -> dict[str, float | int]:
    """Put what was learned into a float32 base model, in place; `strength` as in the recipe's merge section.

    Returns tensors_folded, max_abs_update. Raises ModelError if it does not fit.
    """
    cfg = TrainSettings.model_validate(learned.config)
    if cfg.method == "full":
        return _replace(model, load_file(learned.file(WEIGHTS)), strength)
    _start_over(model, learned, cfg, into)
    targets = adapter_targets(model, cfg.target_modules, cfg.last_layers)
    return fold_adapter(model, load_file(learned.file(ADAPTER)), cfg.scale, targets, strength)


def attach_learned(model: Any, learned: Artifact, into: Into) -> Any:
    """What `merge_learned` gives at full strength, but with the adapter still beside the weights, as PEFT computes it.

    PEFT reads the adapter's own files, so that the two agree only if what was folded is what the adapter says.
    """
    cfg = TrainSettings.model_validate(learned.config)
    if cfg.method == "full":
        _replace(model, load_file(learned.file(WEIGHTS)), 1.0)
        return model
    _start_over(model, learned, cfg, into)
    return PeftModel.from_pretrained(model, str(learned.path)).get_base_model()


def _start_over(model: Any, learned: Artifact, cfg: TrainSettings, into: Into) -> None:
    """Make a float32 base what the adapter was started beside, in place."""
    if SUBTRACTED in learned.manifest.files:
        named = load_file(learned.file(SUBTRACTED))
        names = {name.rpartition(".")[0] for name in named}
        _subtract(model, {name: (named[f"{name}.A"], named[f"{name}.B"]) for name in names}, cfg.scale)
    if cfg.method == "qlora":
        layers = range(len(model.get_decoder().layers))
        chosen = [into] * len(layers) if isinstance(into, str) else into
        dequantized_base(model, _four_bits(cfg), [n for n in layers if chosen[n] == DEQUANTIZED])


def _four_bits(cfg: TrainSettings) -> FourBits:
    return FourBits(cfg.quant, cfg.double_quant)


@torch.no_grad()
def _replace(model: Any, weights: Mapping[str, torch.Tensor], strength: float) -> dict[str, float | int]:
    own, largest = dict(model.named_parameters()), 0.0
    if strange := sorted(name for name, value in weights.items() if name not in own or own[name].shape != value.shape):
        raise ModelError(
            f"the trained weights do not fit the model: {strange[0]!r}", "merge them only into the base they came from"
        )
    for name, value in weights.items():
        largest = max(largest, strength * float((value - own[name]).abs().max()))
        own[name].lerp_(value, strength)
    return {"tensors_folded": len(weights), "max_abs_update": largest}


def _start(model: Any, cfg: TrainSettings, targets: list[str]) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """What each adapter begins with, and what is taken from the base for it before that is quantised.

    PiSSA (Meng et al. 2024, arXiv:2404.02948): both are the base's largest directions. LoftQ (Li et al. 2023,
    arXiv:2310.08659): the adapter begins with what the quantised base lacks, which is quantised again without that.
    """
    start: dict[str, Pair] = {}
    subtracted: dict[str, Pair] = {}
    if cfg.init == "lora":
        return start, subtracted
    torch.manual_seed(cfg.seed)
    linears, four_bits = dict(decoder_linears(model)), _four_bits(cfg)
    for name in targets:
        weight = linears[name].weight.detach()
        if cfg.init == "pissa":
            start[name] = subtracted[name] = _largest_directions(weight, cfg)
            continue
        pair = _largest_directions(weight - four_bits.round_trip(weight), cfg)
        for _ in range(LOFTQ_ROUNDS - 1):
            subtracted[name] = pair
            kept = four_bits.round_trip(weight - cfg.scale * pair[1] @ pair[0])
            pair = _largest_directions(weight - kept, cfg)
        start[name] = pair
    return start, subtracted


def _largest_directions(weight: torch.Tensor, cfg: TrainSettings) -> Pair:
    """The pair whose scaled product is the best approximation of a weight [out, in] of the adapter's rank."""
    rank = min(cfg.rank, *weight.shape)
    u, s, v = torch.svd_lowrank(weight, rank, niter=SVD_ITERATIONS)
    root = (s / cfg.scale).sqrt()
    a, b = root[:, None] * v.t(), u * root
    missing = cfg.rank - rank
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


@torch.no_grad()
def _subtract(model: Any, pairs: Mapping[str, Pair], scale: float) -> None:
    linears = dict(decoder_linears(model))
    for name, (a, b) in pairs.items():
        linears[name].weight.sub_(scale * b @ a)
