"""The 4-bit base and its adapter: what is trained, what is folded, what is refused."""

from copy import deepcopy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.errors import ModelError, RecipeError
from edgeft.learning_settings import TrainSettings
from edgeft.tune.precision import Compute, choose_compute
from edgeft.tune.qlora import (
    FoldedLora,
    FourBits,
    adapter_targets,
    adapter_tensors,
    add_adapter,
    decoder_linears,
    dequantized_base,
    fold_adapter,
    load_4bit,
)

CPU = Compute(torch.device("cpu"), torch.float32, {})
TARGETS = ("q_proj", "down_proj")
IDS = torch.arange(10)[None]


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def four_bit(model: LlamaForCausalLM) -> Any:
    return load_4bit(model, FourBits(), CPU)[0]


def adapted(base: LlamaForCausalLM, targets: tuple[str, ...] = TARGETS, **settings: Any) -> Any:
    cfg = TrainSettings(rank=4, alpha=8, target_modules=targets, **settings)
    return add_adapter(base, cfg, adapter_targets(base, targets, None))


def with_random_adapter(
    base: LlamaForCausalLM, targets: tuple[str, ...] = TARGETS
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = adapted(base, targets)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return model, adapter_tensors(model, trained)


def test_the_cached_base_equals_live_bitsandbytes_layers() -> None:
    """On a CPU the base is dequantised once: it must compute what Linear4bit computes."""
    model = tiny()
    cached = four_bit(deepcopy(model))
    for name, linear in list(decoder_linears(model)):
        sizes = (linear.in_features, linear.out_features)
        live = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        live.load_state_dict(linear.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, live.to("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(cached(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_quantising_changes_the_linears_and_nothing_else() -> None:
    model, before = tiny(), tiny().state_dict()
    dequantized_base(model, FourBits())
    linears = {f"{name}.weight" for name, _ in decoder_linears(model)}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == linears
    assert len(linears) == 14


def test_only_the_adapter_is_trainable() -> None:
    model = adapted(four_bit(tiny()))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in n and any(t in n for t in TARGETS) for n in trainable)


@pytest.mark.parametrize("targets", [TARGETS, TrainSettings().target_modules, ("k_proj", "v_proj", "up_proj")])
def test_the_folded_form_trains_what_peft_trains(targets: tuple[str, ...]) -> None:
    """Loss and gradients equal PEFT's own layers, also after the adapter has changed."""
    base = four_bit(tiny())
    folded, _ = with_random_adapter(deepcopy(base), targets)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    plain = get_peft_model(base, config)
    plain.load_state_dict(folded.state_dict())
    ours, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (folded, plain))
    assert set(ours) == set(theirs)
    assert any(isinstance(m, FoldedLora) for m in folded.modules())
    for _ in range(2):
        for model in (folded, plain):
            model.zero_grad()
            model(IDS, labels=IDS).loss.backward()
        for name, weight in ours.items():
            assert weight.grad is not None and theirs[name].grad is not None
            torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-6, rtol=1e-3)
            assert float(weight.grad.abs().max()) > 0
        with torch.no_grad():
            for weight in (*ours.values(), *theirs.values()):
                weight.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_kept_in_four_bits_computes_the_same_and_takes_less(dtype: torch.dtype) -> None:
    model, packed = load_4bit(tiny(), FourBits(), CPU)
    cfg = TrainSettings(rank=4, alpha=8, target_modules=TARGETS)
    targets = adapter_targets(model, TARGETS, None)
    whole = add_adapter(deepcopy(model).to(dtype), cfg, targets).to(dtype)
    kept = add_adapter(deepcopy(model).to(dtype), cfg, targets, packed=packed).to(dtype)
    with torch.no_grad():
        assert torch.equal(kept(IDS).logits, whole(IDS).logits)
    for name in targets:
        assert kept.get_submodule(f"base_model.model.{name}").get_base_layer().weight.numel() == 0
        codes = packed[name][0]
        assert codes.numel() * codes.element_size() * 2 == model.get_submodule(name).weight.numel()


def test_dropout_keeps_pefts_own_layers() -> None:
    model = adapted(four_bit(tiny()), dropout=0.1)
    assert not any(isinstance(m, FoldedLora) for m in model.modules())


def test_folding_gives_the_function_that_was_trained() -> None:
    base = four_bit(tiny())
    merged = deepcopy(base)
    model, tensors = with_random_adapter(base)
    report = fold_adapter(merged, tensors, 2.0, adapter_targets(merged, TARGETS, None))
    with torch.no_grad():
        trained, untrained = model(IDS).logits, four_bit(tiny())(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, trained, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(
            trained, untrained, atol=1e-2
        )  # an adapter that does nothing would pass the line above
    assert report["tensors_folded"] == 4
    assert report["max_abs_update"] > 0


def test_an_adapter_with_a_missing_layer_is_refused_and_names_it() -> None:
    base = four_bit(tiny())
    merged = deepcopy(base)
    _, tensors = with_random_adapter(base)
    partial = {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        fold_adapter(merged, partial, 2.0, adapter_targets(merged, TARGETS, None))


def test_an_adapter_of_another_width_is_refused() -> None:
    base = four_bit(tiny())
    merged = deepcopy(base)
    _, tensors = with_random_adapter(base)
    wrong = {k: torch.zeros(4, 32) if "lora_A" in k else v for k, v in tensors.items()}
    with pytest.raises(ModelError, match="does not fit"):
        fold_adapter(merged, wrong, 2.0, adapter_targets(merged, TARGETS, None))


def test_an_unknown_target_module_is_named_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"no query_key.*it has .*q_proj"):
        adapter_targets(tiny(), ("query_key",), None)


def test_a_forced_precision_is_taken_and_only_its_rate_measured() -> None:
    forced = choose_compute("bf16")
    assert forced.dtype is torch.bfloat16
    assert list(forced.gflops) == ["bf16"]
    assert forced.rate > 0
