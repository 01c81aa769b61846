"""Several adapters of one base made one, by PEFT, and where they contradict each other.

linear is the exact sum of the updates: adapters put side by side. TIES (Yadav et al. 2023, arXiv:2306.01708) and DARE
(Yu et al. 2023, arXiv:2311.03099) work on whole updates; of the result the largest directions are kept, as many as all
ranks together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from edgeft.artifact import Artifact, Manifest, scan_files
from edgeft.errors import ModelError
from edgeft.formats.hf import load_model
from edgeft.learning_settings import MergeSettings, TrainSettings
from edgeft.progress import Reporter
from edgeft.text.chat import read_json
from edgeft.tune.methods import ADAPTER

OWN, COMBINED = "own", "combined"
KINDS = {"linear": "cat", "ties": "ties_svd", "dare_linear": "dare_linear_svd", "dare_ties": "dare_ties_svd"}
SETTINGS = "adapter_config.json"


def combine_adapters(
    base: Artifact, learned: Artifact, cfg: MergeSettings, out: Path, report: Reporter
) -> tuple[Artifact, dict[str, Any]]:
    """Write the trained adapter and the others of `cfg` as one adapter into folder `out`.

    Returns it, with the records of the trained one, and how each of the others goes with that.
    Raises ModelError if one is of another base, of another form, or on other layers.
    """
    model: Any = PeftModel.from_pretrained(
        load_model(base.path, torch.float32), str(learned.path), adapter_name=OWN, autocast_adapter_dtype=False
    )
    layers = {name for name, _ in _layers(model, OWN)}
    names, weights = [OWN], [1.0]
    for number, other in enumerate(cfg.adapters, 1):
        folder, name = Path(other.adapter), f"other {number}"
        _check(folder, base)
        model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
        if strange := sorted(layers ^ {layer for layer, _ in _layers(model, name)}):
            raise ModelError(
                f"the adapter {folder} is on other layers than the trained one, for example {strange[0]!r}",
                "set train.target_modules and train.last_layers as they were for that adapter",
            )
        names.append(name)
        weights.append(other.weight)
    rank = sum(model.peft_config[name].r for name in names)
    how = {} if cfg.combine == "linear" else {"svd_rank": rank, "svd_full_matrices": False, "density": cfg.density}
    torch.manual_seed(TrainSettings.model_validate(learned.config).seed)  # DARE drops by chance
    model.base_model.add_weighted_adapter(names, weights, COMBINED, KINDS[cfg.combine], **how)
    conflicts = [
        {"adapter": Path(other.adapter).name, "weight": other.weight, **conflict(model, name, cfg.density)}
        for name, other in zip(names[1:], cfg.adapters, strict=True)
    ]
    for found in conflicts:
        report.note(
            f"{found['adapter']} has {found['size']:.2f} times the size of what was trained; of the entries large in "
            f"both {found['opposed']:.1%} have opposite signs (50% is chance), most in {found['most_opposed']}"
        )
    _save(model, out)
    settings = {**learned.config, "rank": rank, "alpha": rank, "rslora": False}
    old = learned.manifest
    made = Manifest(old.kind, old.stage, old.key, settings, old.inputs, scan_files(out), old.metrics)
    return Artifact(out, made), {"combined": {"how": cfg.combine, "rank": rank, "adapters": conflicts}}


@torch.no_grad()
def conflict(model: Any, other: str, density: float) -> dict[str, Any]:
    """How an adapter's update goes with the trained one's, over all layers.

    size: its norm over that of the trained one; cosine between the two; opposed: of the entries among the largest
    `density` of both the share whose signs differ; most_opposed: the layer in which that share is highest.
    """
    sums, both, opposed, most = torch.zeros(3, dtype=torch.float64), 0, 0, (-1.0, "")
    for name, layer in _layers(model, other):
        own, new = (layer.get_delta_weight(adapter).flatten() for adapter in (OWN, other))
        sums += torch.stack([own @ own, own @ new, new @ new]).double()
        large = _largest(own, density) & _largest(new, density)
        differ = int((large & (own.sign() != new.sign())).sum())
        both, opposed = both + int(large.sum()), opposed + differ
        most = max(most, (differ / max(1, int(large.sum())), name))
    own_square, product, new_square = map(float, sums)
    return {
        "size": math.sqrt(new_square / max(own_square, 1e-30)),
        "cosine": product / max(math.sqrt(own_square * new_square), 1e-30),
        "opposed": opposed / max(1, both),
        "most_opposed": most[1],
    }


def _largest(values: torch.Tensor, density: float) -> torch.Tensor:
    sizes = values.abs()
    least = sizes.kthvalue(max(1, round((1 - density) * len(sizes)))).values
    return sizes > least


def _layers(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """The linears that an adapter is on, by their names in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield name, module


def _check(folder: Path, base: Artifact) -> None:
    """Raises ModelError if the folder holds no plain LoRA adapter, or one of another base."""
    missing = [name for name in (SETTINGS, ADAPTER) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"merge.adapters: {folder} has no {missing[0]}", "name the folder of a PEFT adapter")
    settings = read_json(folder / SETTINGS)
    if settings.get("peft_type") != "LORA" or settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise ModelError(
            f"merge.adapters: {folder} is no plain LoRA adapter (peft_type {settings.get('peft_type')}, use_dora "
            f"{settings.get('use_dora')}, bias {settings.get('bias')})",
            "only plain LoRA adapters can be merged with others",
        )
    made_on = str(settings.get("base_model_name_or_path"))
    if made_on.startswith("sha256:") and made_on != f"sha256:{base.digest}":
        raise ModelError(
            f"merge.adapters: {folder} was trained on base {made_on[7:19]}, this base is {base.digest[:12]}",
            "merge only adapters of one base",
        )


def _save(model: Any, out: Path) -> None:
    state = get_peft_model_state_dict(model, adapter_name=COMBINED, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in state.items()}, out / ADAPTER, metadata={"format": "pt"})
    settings = {**model.peft_config[COMBINED].to_dict(), "inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    (out / SETTINGS).write_text(json.dumps(plain, indent=2, sort_keys=True), "utf-8")
