"""Attention and RMSNorm with their gradients, in as few passes over memory as torch's own operations allow.

For training on a CPU, where every pass costs. Rows are laid one after the other in one sequence without padding, what
they share only once in front of them: N tokens after P shared ones. Attention takes neighbours of similar length
together: B rows of T tokens, padded to the longest. Lengths are rounded up, so that few different shapes come up:
oneDNN builds and keeps a program for each. H query heads of width D, G key heads, R = H / G query heads for each key
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

ROWS_ATTENTION = "edgeft_rows"
ALIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types whose attention is plain: scaled, causal


GROUP = 4  # rows that attention takes together
ROUND_ROW, ROUND_SEQUENCE = 8, 32  # tokens to whose multiples rows in attention and whole sequences are padded


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a sequence, laid into a grid of B rows of T places, padded with copies of its first token.

    Every row sees the P tokens of the prefix, except the first one if it is the prefix itself.
    """

    part: slice  # where they stand in the sequence
    prefix: int
    count: int  # B
    longest: int  # T
    alone: bool  # the first row sees no prefix
    place_of: torch.Tensor  # [tokens of the part]: among the B * T places
    token_at: torch.Tensor  # [B * T]: among the tokens of the part

    @staticmethod
    def of(start: int, prefix: int, lengths: Sequence[int], alone: bool = False) -> Rows:
        longest = _rounded(max(lengths), ROUND_ROW)
        place_of = torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])
        token_at = torch.zeros(len(lengths) * longest, dtype=torch.long)
        token_at[place_of] = torch.arange(len(place_of))
        part = slice(start, start + len(place_of))
        return Rows(part, prefix, len(lengths), longest, alone, place_of, token_at)

    def hidden(self, like: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, P + T]: minus infinity where a token would see a later one of its row, or a prefix not its own."""
        total = self.prefix + self.longest
        later = torch.full((self.longest, total), -torch.inf, dtype=like.dtype, device=like.device)
        hidden = later.triu_(self.prefix + 1).repeat(self.count, 1, 1, 1)
        if self.alone:
            hidden[0, :, :, : self.prefix] = -torch.inf
        return hidden


@dataclass(frozen=True)
class Layout:
    """How one sequence is made up: `prefix` tokens that all rows see, the rows in groups of neighbours, and filling.

    The filling brings the sequence to a round length; it gets nothing from attention.
    """

    prefix: int
    groups: tuple[Rows, ...]

    @staticmethod
    def of(prefix: int, lengths: Sequence[int]) -> Layout:
        """Rows of these lengths after a prefix; the better neighbours fit together, the faster."""
        groups, start = list[Rows](), 0
        for first in range(0, len(lengths), GROUP):
            own, alone = list(lengths[first : first + GROUP]), bool(prefix) and not first
            groups.append(Rows.of(start, prefix, [prefix, *own] if alone else own, alone))
            start = groups[-1].part.stop
        return Layout(prefix, tuple(groups))

    @property
    def tokens(self) -> int:
        end: int = self.groups[-1].part.stop
        return end

    @property
    def filling(self) -> int:
        """Tokens that are missing to a round length."""
        return _rounded(self.tokens, ROUND_SEQUENCE) - self.tokens


def _rounded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


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
    """Causal attention for transformers: query [1, H, P + N, D], key and value [1, G, P + N, D], as `layout` says.

    Without a layout: rows [B, H, T, D] that share nothing. Padding stands behind a row, so causality hides it.
    Returns [1, P + N, H, D] or [B, T, H, D].
    """
    if key.shape[2] != query.shape[2] or attention_mask is not None:
        raise ValueError(f"attention of {tuple(query.shape)} to {tuple(key.shape)}: no cache or mask is known here")
    rows, heads, tokens, width = query.shape
    sides = (side.transpose(1, 2).flatten(0, 1) for side in (query, key, value))
    out: torch.Tensor = _RowsAttention.apply(*sides, layout or Layout.of(0, [tokens] * rows), scaling)  # type: ignore[no-untyped-call]
    return out.view(rows, tokens, heads, width), None


AttentionInterface.register(ROWS_ATTENTION, rows_attention)


class _RowsAttention(torch.autograd.Function):
    """Queries [N, H, D], keys and values [N, G, D] of a sequence to [N, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float
    ) -> torch.Tensor:
        groups, out = key.shape[1], torch.empty_like(query, memory_format=torch.contiguous_format)
        out[layout.tokens :].zero_()
        saved = []
        for rows in layout.groups:
            q = _by_group(_grid(query, rows), groups, rows)
            k, v = _with_prefix(key, rows).mul_(scale), _with_prefix(value, rows)
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(groups, rows.count, -1, rows.longest, scores.shape[-1]).add_(rows.hidden(scores))
            p = torch.softmax(scores, -1)
            torch.index_select(_by_token(torch.bmm(p, v), groups, rows), 0, rows.place_of, out=out[rows.part])
            saved += [q, k, v, p]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.groups, ctx.scale = layout, groups, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        (tokens, heads, width), groups, layout = outer[0].shape, ctx.groups, ctx.layout
        to_q, to_k, to_v = (outer[0].new_empty(tokens, n, width) for n in (heads, groups, groups))
        above: list[torch.Tensor] = []  # what the rows send to the keys and values of the prefix, [P, G, D]
        saved = ctx.saved_tensors  # asked for once: gradient checkpointing hands it out once
        for number, rows in enumerate(layout.groups):
            q, k, v, p = saved[4 * number : 4 * number + 4]
            places = outer[0].new_zeros(rows.count * rows.longest, heads, width)
            g = _by_group(places.index_copy_(0, rows.place_of, outer[0][rows.part]), groups, rows)
            into_v = torch.bmm(p.transpose(1, 2), g)
            into_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            into_k = torch.bmm(into_scores.transpose(1, 2), q).mul_(ctx.scale)
            into = (to_q, torch.bmm(into_scores, k)), (to_k, into_k[:, rows.prefix :]), (to_v, into_v[:, rows.prefix :])
            for side, back in into:
                torch.index_select(_by_token(back, groups, rows), 0, rows.place_of, out=side[rows.part])
            if rows.prefix:
                sent = [side.unflatten(0, (groups, -1))[:, :, : rows.prefix].sum(1).transpose(0, 1)
                        for side in (into_k, into_v)]  # fmt: skip
                above = [a + b for a, b in zip(above, sent, strict=True)] if above else sent
        if above:
            to_k[: layout.prefix] += above[0]
            to_v[: layout.prefix] += above[1]
        for side in (to_q, to_k, to_v):
            side[layout.tokens :].zero_()
        return to_q, to_k, to_v, None, None


def _grid(side_NHD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The tokens of these rows on their places, [B * T, H, D]."""
    return side_NHD[rows.part].index_select(0, rows.token_at)


def _by_group(grid: torch.Tensor, groups: int, rows: Rows) -> torch.Tensor:
    """[B * T, H, D] -> [G B, R T, D]: the query heads that share a key head become rows of one product."""
    split: torch.Tensor = grid.unflatten(1, (groups, -1)).unflatten(0, (rows.count, rows.longest))  # B T G R D
    return split.permute(2, 0, 3, 1, 4).reshape(groups * rows.count, -1, grid.shape[-1])


def _by_token(by_group: torch.Tensor, groups: int, rows: Rows) -> torch.Tensor:
    """The inverse of `_by_group`."""
    split: torch.Tensor = by_group.unflatten(0, (groups, rows.count)).unflatten(2, (-1, rows.longest))  # G B R T D
    return split.permute(1, 3, 0, 2, 4).reshape(rows.count * rows.longest, -1, by_group.shape[-1])


def _with_prefix(side_NGD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Keys or values [G B, P + T, D] of these rows, those of the prefix in front of each."""
    own: torch.Tensor = _grid(side_NGD, rows).unflatten(0, (rows.count, rows.longest)).permute(2, 0, 1, 3)
    if not rows.prefix:
        return own.flatten(0, 1)
    joined = own.new_empty(len(own), rows.count, rows.prefix + rows.longest, own.shape[-1])
    joined[:, :, : rows.prefix] = side_NGD[: rows.prefix].transpose(0, 1)[:, None]
    joined[:, :, rows.prefix :] = own
    return joined.flatten(0, 1)


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


class FewPassMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU; Shazeer 2020, arXiv:2002.05202), as Llama computes it."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(_SiluTimes.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]
        return out


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up; silu is computed again in the backward pass, which costs less than keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        to_silu = outer[0] * up
        to_gate = torch.ops.aten.silu_backward.grad_input(to_silu, gate, grad_input=to_silu)
        return to_gate, F.silu(gate).mul_(outer[0])


@torch.no_grad()
def use_few_passes(model: nn.Module) -> None:
    """Let the norms and feed-forward blocks of a model that compute what these do compute as they do, in place."""
    for module in model.modules():
        theirs: Any = module
        few: Any
        kind = type(theirs).__name__
        if kind.endswith("RMSNorm") and hasattr(theirs, "variance_epsilon"):
            few, width, like = FewPassRMSNorm, theirs.weight.numel(), theirs.weight
        elif kind.endswith("MLP") and all(hasattr(theirs, part) for part in FewPassMLP.__annotations__):
            few, width, like = FewPassMLP, theirs.gate_proj.in_features, theirs.gate_proj.weight
        else:
            continue
        example = torch.linspace(-3, 5, width).to(like)
        if torch.allclose(theirs(example), few.forward(theirs, example), rtol=0.02):
            theirs.__class__ = few
