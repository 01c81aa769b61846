"""Attention and RMSNorm with their gradients, in as few passes over memory as torch's own operations allow.

For training on a CPU, where every pass costs. Rows that begin alike are laid one after the other in one sequence, what
they share only once in front of them: B rows of T tokens after P shared ones. H query heads of width D, G key heads,
R = H / G query heads for each key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

ROWS_ATTENTION = "edgeft_rows"
ALIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types whose attention is plain: scaled, causal


@dataclass(frozen=True)
class Layout:
    """How one sequence is made up: `prefix` tokens that all rows see, then `rows` rows of equal length."""

    prefix: int
    rows: int


def can_take_rows(config: Any) -> bool:
    """Whether a model's attention is one that `rows_attention` computes."""
    return (
        config.model_type in ALIKE
        and not getattr(config, "attention_dropout", 0)
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
    )


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention for transformers: query [1, H, P + B T, D], key and value [1, G, P + B T, D], as `layout` says.

    Without a layout: rows [B, H, T, D] that share nothing. Padding stands behind a row, so causality hides it.
    Returns [1, P + B T, H, D] or [B, T, H, D].
    """
    if key.shape[2] != query.shape[2] or attention_mask is not None:
        raise ValueError(f"attention of {tuple(query.shape)} to {tuple(key.shape)}: no cache or mask is known here")
    rows, heads, tokens, width = query.shape
    if layout is None:
        query, key, value = (side.transpose(0, 1).flatten(1, 2)[None] for side in (query, key, value))
    out: torch.Tensor = _RowsAttention.apply(query, key, value, layout or Layout(0, rows), scaling)  # type: ignore[no-untyped-call]
    return out.view(rows, tokens, heads, width), None


AttentionInterface.register(ROWS_ATTENTION, rows_attention)


class _RowsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        groups = key.shape[1]
        out = query.new_empty(1, tokens, heads, width)
        saved = []
        for part, before in _parts(layout, tokens):
            q = _by_group(query[0, :, part], groups, before.rows) * scale
            k, v = (_with_prefix(side[0], part, before) for side in (key, value))
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.unflatten(1, (heads // groups, -1)).add_(_causal(scores, before.prefix))
            p = torch.softmax(scores, -1)
            _put(out[0, part], torch.bmm(p, v), groups, before.rows)
            saved += [q, k, v, p]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (query.shape, key.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        (_, heads, tokens, width), (_, groups, _, _) = ctx.shapes
        # In memory the heads of a token stand side by side, as the projections want them.
        to_q, to_k, to_v = (outer[0].new_empty(1, tokens, n, width).transpose(1, 2) for n in (heads, groups, groups))
        above: list[torch.Tensor] = []  # what the rows send to the keys and values of the prefix
        parts = list(_parts(ctx.layout, tokens))
        for number in reversed(range(len(parts))):
            part, before = parts[number]
            q, k, v, p = ctx.saved_tensors[4 * number : 4 * number + 4]
            g = _by_group(outer[0][0, part].transpose(0, 1), groups, before.rows)
            into_v = torch.bmm(p.transpose(1, 2), g)
            into_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            into_k = torch.bmm(into_scores.transpose(1, 2), q)
            _put(to_q[0, :, part].transpose(0, 1), torch.bmm(into_scores, k).mul_(ctx.scale), groups, before.rows)
            sides = [into.unflatten(0, (groups, before.rows)) for into in (into_k, into_v)]
            for index, (side, target) in enumerate(zip(sides, (to_k, to_v), strict=True)):
                own = side[:, :, before.prefix :].flatten(1, 2)
                target[0, :, part] = own + above[index] if above and number == 0 else own
            if before.prefix:
                above = [side[:, :, : before.prefix].sum(1) for side in sides]
        return to_q, to_k, to_v, None, None


def _parts(layout: Layout, tokens: int) -> Iterator[tuple[slice, Layout]]:
    """The prefix as one row that sees nothing before it, then the rows, which see the prefix."""
    if layout.prefix:
        yield slice(0, layout.prefix), Layout(0, 1)
    yield slice(layout.prefix, tokens), layout


def _by_group(heads_HND: torch.Tensor, groups: int, rows: int) -> torch.Tensor:
    """[H, B T, D] -> [G B, R T, D]: the query heads that share a key head become rows of one product."""
    split: torch.Tensor = heads_HND.unflatten(0, (groups, -1)).unflatten(2, (rows, -1))  # G R B T D
    return split.transpose(1, 2).reshape(groups * rows, -1, heads_HND.shape[-1])


def _put(target_NHD: torch.Tensor, by_group: torch.Tensor, groups: int, rows: int) -> None:
    """The inverse of `_by_group`, into [B T, H, D]."""
    ratio = target_NHD.shape[1] // groups
    split = by_group.unflatten(0, (groups, rows)).unflatten(2, (ratio, -1))  # G B R T D
    target_NHD.unflatten(0, (rows, -1)).unflatten(2, (groups, ratio)).copy_(split.permute(1, 3, 0, 2, 4))


def _with_prefix(side_GND: torch.Tensor, part: slice, layout: Layout) -> torch.Tensor:
    """Keys or values [G B, P + T, D] of the rows in `part`, those of the prefix in front of each."""
    own: torch.Tensor = side_GND[:, part].unflatten(1, (layout.rows, -1))
    if layout.prefix:
        own = torch.cat([side_GND[:, None, : layout.prefix].expand(-1, layout.rows, -1, -1), own], 2)
    return own.flatten(0, 1)


def _causal(scores: torch.Tensor, prefix: int) -> torch.Tensor:
    """[T, P + T]: minus infinity where a token would see a later one of its row."""
    total = scores.shape[-1]
    later = torch.full((total - prefix, total), -torch.inf, dtype=scores.dtype, device=scores.device)
    return later.triu_(prefix + 1)


class FewPassRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension C (Zhang & Sennrich 2019, arXiv:1910.07467), as Llama computes it."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        inverse = square.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        out = torch.mul(x, inverse, out=torch.empty_like(x))
        ctx.save_for_backward(x, weight, inverse)
        return out.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        to_weight = None
        if ctx.needs_input_grad[1]:
            along = torch.mul(outer[0], x)
            to_weight = torch.mul(along, inverse).flatten(0, -2).sum(0, dtype=inverse.dtype).to(weight.dtype)
        g = outer[0] * weight
        dot = torch.mul(g, x).sum(-1, keepdim=True, dtype=inverse.dtype)
        back = dot.mul_(inverse.pow(3)).div_(x.shape[-1])
        to_x = torch.mul(g, inverse, out=g)
        return to_x.sub_(torch.mul(x, back, out=torch.empty_like(x))), to_weight, None


@torch.no_grad()
def use_few_pass_norms(model: nn.Module) -> None:
    """Let the norms of a model that compute what `FewPassRMSNorm` does compute as it does, in place."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            theirs: Any = module
            example = torch.linspace(-3, 5, theirs.weight.numel()).to(theirs.weight)
            if torch.allclose(theirs(example), FewPassRMSNorm.forward(theirs, example), rtol=0.02):
                theirs.__class__ = FewPassRMSNorm
