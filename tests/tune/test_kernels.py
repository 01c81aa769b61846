"""The kernels against plain formulas and, for their gradients, against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from edgeft.tune.kernels import (
    ROWS_ATTENTION,
    FewPassMLP,
    FewPassRMSNorm,
    Layout,
    can_take_rows,
    rows_attention,
    use_few_passes,
)
from edgeft.tune.precision import PLAIN_TOKENS, Compute, place

HEADS, GROUPS, WIDTH = 4, 2, 3
ROWS = [(0, [5]), (0, [5, 5, 5]), (4, [5]), (4, [5, 5, 5]), (1, [4, 5]), (3, [5, 4, 5, 1, 1, 2, 7]), (0, [2, 9])]


def projections(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    return rows_attention(torch.nn.Module(), q, k, v, None, scaling=WIDTH**-0.5, layout=layout)[0]


@pytest.mark.parametrize(("prefix", "lengths"), ROWS, ids=str)
def test_each_row_sees_the_prefix_and_itself_and_no_other(prefix: int, lengths: list[int]) -> None:
    q, k, v = projections(prefix + sum(lengths))
    found = attention(q, k, v, Layout.of(prefix, lengths))
    for row, length in enumerate(lengths):
        start = prefix + sum(lengths[:row])
        alone = [*range(prefix), *range(start, start + length)]
        k_H, v_H = (side[:, :, alone].repeat_interleave(HEADS // GROUPS, dim=1) for side in (k, v))
        expected = F.scaled_dot_product_attention(q[:, :, alone], k_H, v_H, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(found[:, alone], expected)


@pytest.mark.parametrize(("prefix", "lengths"), ROWS, ids=str)
def test_the_gradients_of_attention_are_right(prefix: int, lengths: list[int]) -> None:
    layout = Layout.of(prefix, lengths)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, layout), projections(prefix + sum(lengths)))


def test_neighbours_are_taken_together_and_shapes_are_round() -> None:
    layout = Layout.of(2, [3, 3, 8, 9, 16, 20])
    assert [(rows.part, rows.count, rows.longest, rows.alone) for rows in layout.groups] == [
        (slice(0, 25), 5, 16, True), (slice(25, 61), 2, 24, False)]  # fmt: skip
    assert (layout.tokens, layout.filling) == (61, 3)
    assert Layout.of(0, [64]).filling == 0


def test_the_filling_gets_nothing_and_gives_nothing() -> None:
    layout = Layout.of(3, [9, 4])
    q, k, v = projections(layout.tokens + layout.filling)
    found = attention(q, k, v, layout)
    assert layout.filling > 0
    assert not found[0, layout.tokens :].any()
    back = torch.autograd.grad(found.sum(), (q, k, v))
    assert not any(side[0, :, layout.tokens :].any() for side in back)


def test_rows_without_a_layout_share_nothing() -> None:
    q, k, v = (torch.cat([side, 2 * side]) for side in projections(5))
    alone = torch.cat([attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], Layout.of(0, [5])) for i in range(2)])
    torch.testing.assert_close(attention(q, k, v, None), alone)


def tiny(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_cache_is_refused_rather_than_ignored() -> None:
    model, cache = tiny(ROWS_ATTENTION), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="no cache"):
            model(torch.tensor([[4]]), past_key_values=cache, use_cache=True)


def norm(kind: type = LlamaRMSNorm) -> torch.nn.Module:
    made: torch.nn.Module = kind(48, eps=1e-5)
    torch.nn.init.normal_(made.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_computes_what_the_model_wrote(dtype: torch.dtype) -> None:
    theirs, ours = norm().to(dtype), norm().to(dtype)
    use_few_passes(ours)
    assert type(ours) is FewPassRMSNorm
    x = (5 * torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2))).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_gradients_of_the_norm_are_right() -> None:
    ours = norm().double()
    use_few_passes(ours)
    x = torch.randn(2, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weight = ours.get_parameter("weight")

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, {"weight": weight}, x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, weight))


def test_a_norm_with_another_formula_stays_as_it_is() -> None:
    theirs = norm(GemmaRMSNorm)
    theirs.variance_epsilon = 1e-5
    use_few_passes(theirs)
    assert type(theirs) is GemmaRMSNorm


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {}, True),
        ("llama", {"attention_dropout": 0.1}, False),
        ("mistral", {"sliding_window": 4096}, False),
        ("mistral", {"sliding_window": None}, True),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, True),
        ("gemma2", {}, False),  # caps its scores
    ],
)
def test_only_plain_attention_is_taken_over(kind: str, settings: dict[str, object], expected: bool) -> None:
    assert can_take_rows(AutoConfig.for_model(kind, **settings)) is expected


@pytest.mark.parametrize(("longest", "expected"), [(PLAIN_TOKENS, ROWS_ATTENTION), (PLAIN_TOKENS + 1, "sdpa")])
def test_long_rows_keep_the_fused_kernel(longest: int, expected: str) -> None:
    model = place(tiny("eager"), Compute(torch.device("cpu"), torch.float32, {}), longest)
    assert model.config._attn_implementation == expected


def block(act: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=40, hidden_act=act)).double()


def test_the_feed_forward_block_computes_what_the_model_wrote_and_its_gradients_are_right() -> None:
    theirs, ours = block("silu"), block("silu")
    use_few_passes(ours)
    assert type(ours) is FewPassMLP
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.autograd.gradcheck(ours, (x,))


def test_a_feed_forward_block_with_another_activation_stays_as_it_is() -> None:
    theirs = block("gelu")
    use_few_passes(theirs)
    assert type(theirs) is LlamaMLP
