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
from torch import nn
from transformers import AttentionInterface

ROWS_ATTENTION = "edgeft_rows"
ALIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # model types whose attention is plain: scaled, causal


GROUP = 4  # rows that attention takes together
ROUND_ROW, ROUND_SEQUENCE = 16, 32  # tokens to whose multiples rows in attention and whole sequences are padded


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a sequence, and how many tokens at its beginning they see."""

    part: slice  # where they stand
    prefix: int
    count: int
    longest: int
    own: torch.Tensor | None = None  # index of their tokens among [count * longest] places; None: no padding

    @staticmethod
    def of(start: int, prefix: int, lengths: Sequence[int]) -> Rows:
        longest, part = _rounded(max(lengths), ROUND_ROW), slice(start, start + sum(lengths))
        if min(lengths) == longest:
            return Rows(part, prefix, len(lengths), longest)
        own = torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])
        return Rows(part, prefix, len(lengths), longest, own)


@dataclass(frozen=True)
class Layout:
    """How one sequence is made up: `prefix` tokens that all rows see, then the rows in groups of neighbours."""

    prefix: int
    groups: tuple[Rows, ...]

    @staticmethod
    def of(prefix: int, lengths: Sequence[int]) -> Layout:
        """Rows of these lengths after a prefix; the better neighbours fit together, the faster."""
        groups, start = list[Rows](), prefix
        for first in range(0, len(lengths), GROUP):
            groups.append(Rows.of(start, prefix, lengths[first : first + GROUP]))
            start = groups[-1].part.stop
        return Layout(prefix, tuple(groups))

    def filled(self) -> tuple[Layout, int]:
        """With one more row that fills the sequence up to a round length, and its length, which may be 0."""
        tokens = self.groups[-1].part.stop
        filling = _rounded(tokens, ROUND_SEQUENCE) - tokens
        if not filling:
            return self, 0
        return Layout(self.prefix, (*self.groups, Rows.of(tokens, 0, [filling]))), filling

    @property
    def parts(self) -> tuple[Rows, ...]:
        """The prefix as one row that sees nothing before it, then the groups, which see the prefix."""
        return (Rows.of(0, 0, [self.prefix]), *self.groups) if self.prefix else self.groups


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
    if layout is None:
        query, key, value = (side.transpose(0, 1).flatten(1, 2)[None] for side in (query, key, value))
    out: torch.Tensor = _RowsAttention.apply(query, key, value, layout or Layout.of(0, [tokens] * rows), scaling)  # type: ignore[no-untyped-call]
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
        for rows in layout.parts:
            q = _by_group(_padded(query[0].transpose(0, 1), rows), groups, rows.count) * scale
            k, v = (_with_prefix(side[0], rows) for side in (key, value))
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.unflatten(1, (heads // groups, -1)).add_(_causal(scores, rows.prefix))
            p = torch.softmax(scores, -1)
            _put(out[0, rows.part], torch.bmm(p, v), groups, rows)
            saved += [q, k, v, p]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (query.shape, key.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        (_, heads, tokens, width), (_, groups, _, _) = ctx.shapes
        # In memory the heads of a token stand side by side, as the projections want them.
        to_q, to_k, to_v = (outer[0].new_empty(tokens, n, width) for n in (heads, groups, groups))
        above: list[torch.Tensor] = []  # what the rows send to the keys and values of the prefix, [P, G, D]
        saved = ctx.saved_tensors  # asked for once: gradient checkpointing hands it out once
        for number, rows in reversed(list(enumerate(ctx.layout.parts))):
            q, k, v, p = saved[4 * number : 4 * number + 4]
            g = _by_group(_padded(outer[0][0], rows), groups, rows.count)
            into_v = torch.bmm(p.transpose(1, 2), g)
            into_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            into_k = torch.bmm(into_scores.transpose(1, 2), q)
            _put(to_q[rows.part], torch.bmm(into_scores, k).mul_(ctx.scale), groups, rows)
            for target, into in ((to_k, into_k), (to_v, into_v)):
                _put(target[rows.part], into[:, rows.prefix :], groups, rows)
            if rows.prefix:
                sent = [into.unflatten(0, (groups, -1))[:, :, : rows.prefix].sum(1).transpose(0, 1)
                        for into in (into_k, into_v)]  # fmt: skip
                above = [a + b for a, b in zip(above, sent, strict=True)] if above else sent
        if above:
            to_k[: ctx.layout.prefix] += above[0]
            to_v[: ctx.layout.prefix] += above[1]
        to_q, to_k, to_v = (side.transpose(0, 1)[None] for side in (to_q, to_k, to_v))
        return to_q, to_k, to_v, None, None


def _padded(tokens_NHD: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The tokens of these rows as [H, B T, D], zero where a row is padded."""
    own = tokens_NHD[rows.part]
    if rows.own is not None:
        places = own.new_zeros(rows.count * rows.longest, *own.shape[1:])
        own = places.index_copy_(0, rows.own, own)
    return own.transpose(0, 1)


def _by_group(heads_HND: torch.Tensor, groups: int, rows: int) -> torch.Tensor:
    """[H, B T, D] -> [G B, R T, D]: the query heads that share a key head become rows of one product."""
    split: torch.Tensor = heads_HND.unflatten(0, (groups, -1)).unflatten(2, (rows, -1))  # G R B T D
    return split.transpose(1, 2).reshape(groups * rows, -1, heads_HND.shape[-1])


def _put(target_NHD: torch.Tensor, by_group: torch.Tensor, groups: int, rows: Rows) -> None:
    """The inverse of `_by_group`, without the padding, into the tokens of these rows [N, H, D]."""
    ratio = target_NHD.shape[1] // groups
    split = by_group.unflatten(0, (groups, rows.count)).unflatten(2, (ratio, -1)).permute(1, 3, 0, 2, 4)  # B T G R D
    if rows.own is None:
        target_NHD.unflatten(0, (rows.count, -1)).unflatten(2, (groups, ratio)).copy_(split)
    else:
        torch.index_select(split.reshape(-1, *target_NHD.shape[1:]), 0, rows.own, out=target_NHD)


def _with_prefix(side_GND: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Keys or values [G B, P + T, D] of these rows, those of the prefix in front of each."""
    own: torch.Tensor = _padded(side_GND.transpose(0, 1), rows).unflatten(1, (rows.count, -1))
    if rows.prefix:
        own = torch.cat([side_GND[:, None, : rows.prefix].expand(-1, rows.count, -1, -1), own], 2)
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
