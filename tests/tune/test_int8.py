"""Products in 8 bits: how close they come, what stays exact, and which layers take part."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeft.errors import RecipeError
from edgeft.learning_settings import TrainSettings
from edgeft.tune import precision
from edgeft.tune.int8 import AdaptedProduct, Int8Weight, TrainedProduct, to_codes
from edgeft.tune.int8_layers import Int8Linear, Int8Lora, use_int8
from edgeft.tune.precision import Compute, choose_compute, settled_compute
from edgeft.tune.qlora import FoldedLora, FourBits, add_adapter, decoder_linears, load_4bit
from tests.tune.test_qlora import CPU, IDS, tiny

N, I, O = 40, 96, 64  # noqa: E741 (tokens, inputs, outputs)


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, I], weight [O, I], outer gradient [N, O]."""
    torch.manual_seed(seed)
    return torch.randn(N, I), torch.randn(O, I), torch.randn(N, O)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def test_whole_numbers_within_reach_are_multiplied_exactly() -> None:
    torch.manual_seed(0)
    x, weight, g = (torch.randint(-127, 128, size).float() for size in ((N, I), (O, I), (N, O)))
    for side in (x, weight, g):
        side[:, 0] = 127  # so that a step of every row is 1
    codes = Int8Weight.of(weight, torch.ones(I))
    assert torch.equal(codes.codes_OI.float(), weight)
    torch.testing.assert_close(codes.times(x), x @ weight.t(), rtol=1e-5, atol=0)
    torch.testing.assert_close(codes.back(g), g @ weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_come_within_two_percent(dtype: torch.dtype) -> None:
    x, weight, g = example()
    codes = Int8Weight.of(weight, torch.ones(I))
    forward, back = codes.times(x.to(dtype)), codes.back(g.to(dtype))
    assert forward.dtype is back.dtype is dtype
    assert 0 < apart(forward.float(), x @ weight.t()) < 0.02
    assert 0 < apart(back.float(), g @ weight) < 0.02


def test_a_row_of_zeros_gives_zeros() -> None:
    x, weight, _ = example()
    x[3] = 0
    assert not Int8Weight.of(weight, torch.ones(I)).times(x)[3].any()


def test_rounding_leaves_its_input_alone() -> None:
    x, _, _ = example()
    before = x.clone()
    codes, scales = to_codes(x, torch.ones(I))
    to_codes(x.flip(0), torch.ones(I))  # uses the same scratch memory
    assert torch.equal(x, before)
    assert float((codes * scales - x).abs().max()) <= float(scales.max()) / 2 * 1.001


def test_gradients_to_the_adapter_are_those_of_the_exact_product() -> None:
    x, weight, g = example()
    a, b = torch.randn(4, I).requires_grad_(), torch.randn(O, 4).requires_grad_()
    x.requires_grad_()
    out: torch.Tensor = AdaptedProduct.apply(x, a, b, Int8Weight.of(weight, torch.ones(I)), 0.5)  # type: ignore[no-untyped-call]
    exact = x @ (weight + 0.5 * b @ a).t()
    assert apart(out, exact) < 0.02
    found, wanted = (torch.autograd.grad(y, (x, a, b), g) for y in (out, exact))
    assert apart(found[0], wanted[0]) < 0.02
    torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-4, atol=1e-4)


def test_the_gradient_to_a_weight_that_learns_is_exact() -> None:
    x, weight, g = example()
    weight.requires_grad_()
    out: torch.Tensor = TrainedProduct.apply(x, weight, Int8Weight.of(weight.detach(), torch.ones(I)))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.autograd.grad(out, weight, g)[0], g.t() @ x, rtol=1e-5, atol=1e-5)


def test_codes_follow_a_weight_that_changed() -> None:
    x, weight, _ = example()
    linear: Any = nn.Linear(I, O, bias=False)
    linear._columns, linear.__class__ = torch.ones(I), Int8Linear
    with torch.no_grad():
        linear.weight.copy_(weight)
        assert apart(linear(x), x @ weight.t()) < 0.02
        linear.weight.mul_(-2)
        assert apart(linear(x), -2 * x @ weight.t()) < 0.02


def adapted(model: Any, **settings: Any) -> tuple[Any, Any]:
    """A tiny PEFT model over a 4-bit base, and the base model in it."""
    base, packed = load_4bit(model, FourBits(), CPU)
    cfg = TrainSettings(rank=4, alpha=8, target_modules=("q_proj", "down_proj"), **settings)
    targets = [name for name, _ in decoder_linears(base) if name.endswith(("q_proj", "down_proj"))]
    peft = add_adapter(base, cfg, targets, packed=packed)
    return peft, peft.get_base_model()


def kinds(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is kind}


def test_adapted_linears_take_part_and_their_weights_become_one_byte() -> None:
    peft, base = adapted(tiny())
    before = base(IDS).logits
    use_int8(base, FoldedLora, lambda: base(IDS))
    assert kinds(base, Int8Lora) == {"q_proj", "down_proj"}
    assert not kinds(base, Int8Linear)
    assert not kinds(base, FoldedLora)
    assert base.model.layers[0].mlp.down_proj.get_base_layer().weight.numel() == 0
    assert 0 < apart(base(IDS).logits, before) < 0.05
    assert all("lora_" in name for name, weight in peft.named_parameters() if weight.requires_grad)


def test_an_adapter_that_peft_computes_is_left_to_it() -> None:
    _, base = adapted(tiny(), dropout=0.1)
    use_int8(base, FoldedLora, lambda: base(IDS))
    assert not kinds(base, Int8Linear)
    assert not kinds(base, Int8Lora)


@pytest.mark.parametrize("settings", [{"dora": True}, {"dropout": 0.1}])
def test_8_bits_on_request_are_refused_where_peft_computes(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without dora and dropout"):
        TrainSettings(precision="int8", **settings)
    assert TrainSettings(**settings).precision == "auto"


def test_the_head_stays_exact() -> None:
    model = tiny()
    use_int8(model, nn.Linear, lambda: model(IDS))
    assert kinds(model, nn.Linear) == {"lm_head"}
    assert len([m for m in model.modules() if type(m) is Int8Linear]) == 14


def test_the_gradient_of_a_loss_over_many_tokens_would_be_lost_in_8_bits() -> None:
    """Why: all but the label's own entry round to nothing, though together they weigh as much."""
    logits = torch.zeros(1, 4096).requires_grad_()
    nn.functional.cross_entropy(logits, torch.tensor([7])).backward()
    assert logits.grad is not None
    codes, _ = to_codes(logits.grad, torch.ones(4096))
    assert codes.nonzero().tolist() == [[0, 7]]
    assert float(logits.grad[:, 8:].sum()) > 0.99


def test_the_largest_channels_are_moved_into_the_weight() -> None:
    """One input channel that is a hundred times as large as the others costs them less than without."""
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 100
    exact = deepcopy(model)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            seen[name] = inputs[0].detach()[0]

        return hook

    exact.model.layers[0].self_attn.q_proj.register_forward_hook(keep("x"))
    exact(IDS)
    weight = exact.model.layers[0].self_attn.q_proj.weight.detach()
    use_int8(model, nn.Linear, lambda: model(IDS))
    ours: Any = model.model.layers[0].self_attn.q_proj
    wanted = seen["x"] @ weight.t()
    plain = Int8Weight.of(weight, torch.ones(64)).times(seen["x"])
    others = wanted - seen["x"][:, 5:6] * weight[:, 5]  # what the small channels say
    with torch.no_grad():
        assert (ours(seen["x"]) - wanted).norm() / others.norm() < 0.6 * (plain - wanted).norm() / others.norm()


@pytest.mark.parametrize("method", ["adapter", "weights"])
def test_a_model_learns_in_8_bits_what_it_learns_in_32(method: str) -> None:
    fell: dict[bool, float] = {}
    for int8 in (False, True):
        peft, base = adapted(tiny()) if method == "adapter" else (tiny(), None)
        base = base or peft
        if int8:
            use_int8(base, FoldedLora if method == "adapter" else nn.Linear, lambda base=base: base(IDS))
        optimizer = torch.optim.AdamW(
            [p for p in peft.parameters() if p.requires_grad], lr=3e-2 if method == "adapter" else 1e-2
        )
        losses = []
        for _ in range(40):
            loss = peft(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        fell[int8] = losses[0] - losses[-1]
    assert fell[False] > 1  # of 4.2
    assert fell[True] == pytest.approx(fell[False], rel=0.05)


def rates(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, int8: float) -> None:
    by_type = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(precision, "gemm_gflops", lambda dtype, device: by_type[dtype])
    monkeypatch.setattr(precision, "int8_gflops", lambda: int8)


@pytest.mark.parametrize(
    ("measured", "dtype", "int8"),
    [
        ((300.0, 60.0, 900.0), torch.float32, True),
        ((300.0, 1200.0, 1500.0), torch.bfloat16, False),  # a little faster is not enough
        ((300.0, 60.0, 100.0), torch.float32, False),
    ],
)
def test_8_bits_are_taken_where_they_win_clearly(
    monkeypatch: pytest.MonkeyPatch, measured: tuple[float, float, float], dtype: torch.dtype, int8: bool
) -> None:
    rates(monkeypatch, *measured)
    found = choose_compute("auto", frozen=True)
    assert (found.dtype, found.int8) == (dtype, int8)
    assert not choose_compute("auto").int8  # weights that learn gain too little
    assert found.rate == max(measured[:2])
    forced = choose_compute("int8")
    assert (forced.dtype, forced.int8) == (dtype, True)
    assert not choose_compute("fp32").int8


def test_a_stage_that_goes_on_computes_as_it_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates(monkeypatch, 300.0, 60.0, 900.0)
    began = settled_compute(tmp_path / "checkpoints", "auto", frozen=True)
    assert began.int8
    rates(monkeypatch, 30.0, 60.0, 9.0)  # a busy machine
    assert settled_compute(tmp_path / "checkpoints", "auto", frozen=True) == began
    assert settled_compute(tmp_path / "another", "auto", frozen=True).name == "bf16"
    monkeypatch.setattr(precision, "best_device", lambda: torch.device("meta"))  # the folder came to another machine
    assert settled_compute(tmp_path / "checkpoints", "fp32").name == "fp32"


def test_all_processes_of_a_launch_compute_as_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates(monkeypatch, 300.0, 60.0, 900.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with ThreadPoolExecutor() as pool:
        helper = pool.submit(settled_compute, tmp_path, "auto", frozen=True)
        with pytest.raises(TimeoutError):
            helper.result(timeout=0.5)
        monkeypatch.setenv("RANK", "0")
        first = settled_compute(tmp_path, "auto")  # it found that floating point is faster
        assert not first.int8 and helper.result(timeout=30) == first


def test_8_bits_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match="for CPUs"):
        choose_compute("int8")


def test_what_was_chosen_is_said() -> None:
    compute = Compute(torch.device("cpu"), torch.float32, {"fp32": 300.0, "int8": 900.0}, int8=True)
    assert compute.described.startswith("int8 products, all else fp32 on cpu")
