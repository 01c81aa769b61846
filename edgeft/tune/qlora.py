"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): a frozen 4-bit base and a trainable low-rank adapter.

On a GPU the base stays in 4 bits and bitsandbytes dequantises it on the fly. On a CPU base and adapter are folded into
one weight in the training precision once per step, from the 4-bit base dequantised for it: the forward pass and the
gradient to the input are then one product each. Where integers are faster, `tune.int8_layers` takes the place of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict
from torch import nn

from edgeft.errors import ModelError, RecipeError
from edgeft.learning_settings import TrainSettings
from edgeft.tune.precision import Compute

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r]
Packed = tuple[torch.Tensor, Any]  # two 4-bit codes a byte, and bitsandbytes' QuantState: shape and scales


def decoder_linears(model: Any, last_layers: int | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the decoder blocks, by name; embeddings and the output head are not among them."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    first = 0 if last_layers is None else max(0, len(decoder.layers) - last_layers)
    for number, layer in list(enumerate(decoder.layers))[first:]:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{prefix}.layers.{number}.{name}", module


@dataclass(frozen=True)
class FourBits:
    """A 4-bit type of bitsandbytes in blocks of 64: nf4 or fp4, its scales quantised too or not."""

    kind: str = "nf4"
    double_quant: bool = True

    def pack(self, weight: torch.Tensor) -> Packed:
        packed, state = quantize_4bit(
            weight.float().contiguous(), quant_type=self.kind, compress_statistics=self.double_quant
        )
        return packed, state

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The float32 values that a weight has in this type."""
        return unpack(self.pack(weight), torch.float32)


def unpack(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight that 4-bit codes stand for, computed in float32 and then rounded."""
    codes, state = packed
    state.dtype = dtype  # bitsandbytes gives the type that was quantised; this spares a second pass
    return dequantize_4bit(codes, state)


def layer_number(name: str) -> int:
    """The decoder layer that a linear of `decoder_linears` belongs to."""
    return int(name.rpartition(".layers.")[2].partition(".")[0])


@torch.no_grad()
def dequantized_base(model: Any, four_bits: FourBits, layers: Collection[int] | None = None) -> dict[str, Packed]:
    """Replace the weights of the decoder's linears by what their 4-bit form stands for, in place; returns that form.

    `layers`: in these decoder layers only.
    """
    forms = {}
    for name, linear in decoder_linears(model):
        if layers is not None and layer_number(name) not in layers:
            continue
        forms[name] = four_bits.pack(linear.weight)
        linear.weight.copy_(unpack(forms[name], torch.float32))
    return forms


def load_4bit(model: Any, four_bits: FourBits, compute: Compute) -> tuple[Any, dict[str, Packed]]:
    """Turn a float32 model into a frozen 4-bit base; returns it and, on a CPU, its weights' 4-bit form by name."""
    model.requires_grad_(False)
    if compute.device.type == "cpu":
        return model, dequantized_base(model, four_bits)
    for name, linear in list(decoder_linears(model)):
        packed = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute.dtype,
            compress_statistics=four_bits.double_quant,
            quant_type=four_bits.kind,
        )
        packed.load_state_dict(linear.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    return model.to(compute.device), {}


def adapter_targets(model: Any, patterns: Sequence[str], last_layers: int | None) -> list[str]:
    """Names of the linears that get an adapter: those whose own name or dotted path matches one of the patterns.

    Raises RecipeError for a pattern that matches none, with the names that there are.
    """
    names = [name for name, _ in decoder_linears(model)]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            present = sorted({name.rpartition(".")[2] for name in names})
            raise RecipeError(
                f"train.target_modules: the model has no {pattern}; it has {', '.join(present)}",
                "correct target_modules",
            )
    if last_layers is not None:
        names = [name for name, _ in decoder_linears(model, last_layers)]
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.rpartition(".")[2], pattern) or fnmatchcase(name, pattern)


def add_adapter(
    model: Any,
    cfg: TrainSettings,
    targets: Sequence[str],
    start: Mapping[str, Pair] | None = None,
    packed: Mapping[str, Packed] | None = None,
) -> Any:
    """Put a LoRA adapter on the named linears; returns the PEFT model, whose only trainable weights are the adapter's.

    It starts from the pairs in `start`, from nothing where there are none. Linears in `packed` are kept in that form
    if they are folded (`FoldedLora`).
    """
    torch.manual_seed(cfg.seed)
    short = sorted({name.rpartition(".")[2] for name in targets})  # adapter_config.json names kinds where it can
    config = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
        target_modules=short if adapter_targets(model, short, None) == list(targets) else sorted(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, pair in (start or {}).items():
        layer: Any = adapted.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            for side, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                side["default"].weight.copy_(value)
    fold_while_training(adapted, packed or {})
    return adapted


class _FoldedProduct(torch.autograd.Function):
    """x [*, in] times folded [out, in], with gradients to x and to the adapter A [r, in], B [out, r] in it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, folded: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, folded)
        ctx.scale = scale
        return F.linear(x, folded)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None, None]:
        x, a, b, folded = ctx.saved_tensors
        g_NO, x_NI = outer[0].flatten(0, -2), x.flatten(0, -2)
        to_x = (g_NO @ folded).view_as(x) if ctx.needs_input_grad[0] else None
        low_NR = (g_NO @ b).mul_(ctx.scale)
        to_b = ((x_NI @ a.t()).mul_(ctx.scale).t() @ g_NO).t()
        return to_x, low_NR.t() @ x_NI, to_b, None, None


class FoldedLora(LoraLinear):
    """PEFT's LoRA linear, computed as one product with the folded weight, over a base that may be kept in 4 bits.

    The weight is folded anew when the adapter has changed; `fold_while_training` turns PEFT's layers into this one.
    """

    _packed: Packed | None = None
    _folded: torch.Tensor
    _folded_from: tuple[int, int, torch.dtype] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        a, b = (cast("torch.Tensor", side["default"].weight) for side in (self.lora_A, self.lora_B))
        scale = self.scaling["default"]
        version = (a._version, b._version, a.dtype)
        if self._folded_from != version:
            weight = base.weight if self._packed is None else unpack(self._packed, b.dtype)
            self._folded, self._folded_from = torch.addmm(weight, b.detach(), a.detach(), alpha=scale), version
        product: torch.Tensor = _FoldedProduct.apply(x, a, b, self._folded, scale)  # type: ignore[no-untyped-call]
        return product if base.bias is None else product + base.bias


def fold_while_training(model: Any, packed: Mapping[str, Packed]) -> None:
    """Let PEFT's LoRA linears over plain weights compute as `FoldedLora`, in place; those with dropout or DoRA stay.

    The weights of those in `packed`, by name in the base model, give way to that form.
    """
    for name, module in model.named_modules():
        plain = type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear and not module.lora_variant
        if plain and not any(isinstance(d, nn.Dropout) for d in module.lora_dropout.values()):
            module.__class__ = FoldedLora
            module._packed = packed.get(name.removeprefix("base_model.model."))
            if module._packed is not None:
                module.get_base_layer().weight = nn.Parameter(torch.empty(0), requires_grad=False)


def adapter_tensors(peft_model: Any, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter in PEFT's file names, float32 and contiguous; `trained` holds the values by parameter name."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(peft_model, state_dict=trained)
    return {name: value.detach().float().contiguous().cpu() for name, value in state.items()}


def adapter_config(peft_model: Any, base_name: str) -> dict[str, Any]:
    """What `adapter_config.json` says; PEFT's sets are put in order, so that equal adapters are equal bytes."""
    config = {
        **peft_model.peft_config["default"].to_dict(),
        "base_model_name_or_path": base_name,
        "inference_mode": True,
    }
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


@torch.no_grad()
def fold_adapter(
    model: Any, adapter: Mapping[str, torch.Tensor], scale: float, targets: Sequence[str], strength: float = 1.0
) -> dict[str, float | int]:
    """Add scale * B @ A to each adapted linear of a float32 model, in place (Hu et al. 2021, arXiv:2106.09685).

    Where the adapter holds magnitudes (DoRA, Liu et al. 2024, arXiv:2402.09353), each row of the sum gets that length.
    `strength` is the share of the way that each weight goes towards that.
    Returns tensors_folded, max_abs_update. Raises ModelError if a name or shape does not fit, or one is missing.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in adapter.items():
        name, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        parts.setdefault(name, {})[side] = value.float()
    if set(parts) != set(targets):
        strange = sorted(set(parts) ^ set(targets))
        raise ModelError(
            f"the adapter does not fit the model: {len(strange)} layers differ, for example {strange[0]!r}",
            "merge an adapter only into the base it was trained on",
        )
    linears, largest = dict(decoder_linears(model)), 0.0
    for name, part in parts.items():
        weight = linears[name].weight
        update = scale * (part["lora_B"] @ part["lora_A"])
        if update.shape != weight.shape:
            raise ModelError(
                f"the adapter does not fit: {name} is {tuple(weight.shape)}, its update {tuple(update.shape)}",
                "merge an adapter only into the base it was trained on",
            )
        after = weight + update
        if "lora_magnitude_vector" in part:
            after *= (part["lora_magnitude_vector"] / after.norm(dim=1))[:, None]
        largest = max(largest, strength * float((after - weight).abs().max()))
        weight.lerp_(after, strength)
    return {"tensors_folded": len(parts), "max_abs_update": largest}
