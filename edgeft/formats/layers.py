"""Which layer of a model computes something else than the same layer of another: both are given the same input.

Models in other formats are rebuilt in torch from their tensors and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError
from edgeft.formats.sides import HEAD, Side
from edgeft.text.chat import ChatTokenizer
from edgeft.text.general import general_ids

if TYPE_CHECKING:
    import torch

    from edgeft.formats.diff import LayerGap, TensorGap

TOKENS = 64  # of general text
AMPLIFIED = 3  # a layer's output may differ by so many times the most that one of its tensors may
LEAST = 1e-3  # what rounding alone makes of a layer


def compare_layers(a: Side, b: Side, tensors: Sequence[TensorGap]) -> list[LayerGap]:
    """Every layer of B given what that layer of A is given; nothing if neither side brings a config.json."""
    import torch

    from edgeft.formats.diff import LayerGap

    described = a if a.folder else b
    if described.folder is None:
        return []
    ids_BT = torch.tensor(general_ids(ChatTokenizer.from_folder(described.folder), TOKENS, TOKENS)[:1])
    models = [_rebuilt(side, described) for side in (a, b)]
    with torch.no_grad():
        calls_a, calls_b = (_calls(model, ids_BT) for model in models)
        gaps = []
        for number, (layer_b, (given, _), (_, settings)) in enumerate(
            zip(models[1].get_decoder().layers, calls_a, calls_b, strict=True)
        ):
            added_a = _output(models[0].get_decoder().layers[number], given, calls_a[number][1]) - given
            added_b = _output(layer_b, given, settings) - given
            name = f"model.layers.{number}"
            allowed = max([LEAST, *(AMPLIFIED * gap.allowed for gap in tensors if gap.name.startswith(f"{name}."))])
            size = float(added_a.square().mean().sqrt())
            gaps.append(LayerGap(name, float((added_a - added_b).square().mean().sqrt()) / max(size, 1e-12), allowed))
    return gaps


def _calls(model: Any, ids_BT: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What each layer is given when the model reads these tokens: hidden states, and the rest by name."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def keep(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        settings = {name: value for name, value in named.items() if name != "hidden_states"}
        calls.append((given[0] if given else named["hidden_states"], settings))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.get_decoder().layers]
    model.get_decoder()(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def _output(layer: Any, hidden: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    out = layer(hidden, **settings)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _rebuilt(side: Side, described: Side) -> Any:
    """The model in float32. Raises ModelError if tensors are missing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(str(described.folder), local_files_only=True, trust_remote_code=False)
    config.rms_norm_eps = side.facts.get("norm epsilon", config.rms_norm_eps)
    if "rope_theta" in config.rope_parameters and "rope theta" in side.facts:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": side.facts["rope theta"]}
    config.tie_word_embeddings = HEAD not in side.tensors
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    values = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in side.tensors.items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [name for name in {*values, *shapes} if name not in values or tuple(values[name].shape) != shapes.get(name)]
    if wrong:
        raise ModelError(f"{side.path}: {sorted(wrong)[0]} is missing, too many or of another shape", "export it again")
    model.load_state_dict(values, strict=False)
    return model
