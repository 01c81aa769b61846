"""Which weights a qlora adapter is folded into: every way is measured beside the model that was trained.

The adapter learned over the base in 4 bits. Folded into that it gives the trained model; folded into the base as it was
it gives another, which knows again what 4 bits lose. Each is measured as it is, and cut to the bits of the narrowest
package. R rows, P positions of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.formats.hf import load_model
from edgeft.formats.parity import Differences, differences, summarize
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded
from edgeft.text.general import general_ids
from edgeft.tune.batches import collate, in_parts, shared_tokens, trained_positions
from edgeft.tune.losses import answer_logits, batch_loss
from edgeft.tune.methods import DEQUANTIZED, ORIGINAL, Into, attach_learned, merge_learned
from edgeft.tune.precision import Compute, place
from edgeft.tune.qlora import decoder_linears, layer_number
from edgeft.tune.validation import first_line

PER_LAYER = "per_layer"
ROWS, CHOOSING_ROWS = 32, 32  # validation rows that judge the ways, and others that choose layers
GENERAL_TOKENS, BATCH_ROWS = 512, 8
BLOCK = 32  # weights with one scale, in nearly all packages
CERTAIN = 2.0  # standard errors by which another way must be better than the trained one

Floats = NDArray[np.float32]


class Look(NamedTuple):
    """A model beside the trained one: on validation rows, and on general text."""

    kl_mean: float
    top1: float
    loss: float  # mean cross-entropy per trained token
    exact_match: float  # share of rows whose first line is right
    general_kl: float
    general_perplexity: float


@dataclass(frozen=True)
class Bench:
    """What all ways are measured on, and what the trained model predicts there."""

    rows: list[Encoded]
    general: list[Encoded]
    chat: ChatTokenizer
    compute: Compute
    trained: list[Floats]  # logits [P, V] of each batch, the general text's last

    @staticmethod
    def of(trained: Any, rows: Sequence[Encoded], chat: ChatTokenizer, compute: Compute) -> Bench:
        width = min(GENERAL_TOKENS, trained.config.max_position_embeddings)
        general = [
            Encoded(tuple(ids), (False, *[True] * (len(ids) - 1))) for ids in general_ids(chat, GENERAL_TOKENS, width)
        ]
        logits = [*_logits(trained, rows, chat, compute), *_logits(trained, general, chat, compute)]
        return Bench(list(rows), general, chat, compute, logits)

    def look(self, model: Any) -> tuple[Look, NDArray[np.float64]]:
        """How a model does, and its loss [R] on each row."""
        reference, exact, losses = iter(self.trained), 0, []
        found: list[list[Differences]] = [[], []]
        for parts, rows in zip(found, (self.rows, self.general), strict=True):
            for some, logits_PV in zip(_batches(rows), _logits(model, rows, self.chat, self.compute), strict=True):
                next_ids = np.array([row.ids[at + 1] for row in some for at in trained_positions(row)])
                parts.append(differences(next(reference), logits_PV, next_ids))
                if rows is self.rows:
                    ends = np.cumsum([len(trained_positions(row)) for row in some])[:-1]
                    losses += [float(nll.mean()) for nll in np.split(parts[-1].nll_P, ends)]
                    right = np.split(logits_PV.argmax(1) == next_ids, ends)
                    exact += sum(bool(r[first_line(row, self.chat)].all()) for r, row in zip(right, some, strict=True))
        task, general = (summarize(parts) for parts in found)
        look = Look(
            task.kl_mean, task.top1, math.log(task.perplexity), exact / len(self.rows), general.kl_mean,
            general.perplexity,
        )  # fmt: skip
        return look, np.array(losses)


def choose_into(
    wish: str, base: Path, learned: Artifact, rows: Sequence[Encoded], bits: int | None, compute: Compute
) -> tuple[str, Into, dict[str, Any]]:
    """The best way to fold a qlora adapter into a base, what it is by layer, and what was measured.

    `wish` is auto, or the one way that is taken. Another way than the trained one is the best if its loss on
    validation rows, cut to `bits` where packages are, is lower by more than chance (`CERTAIN`) makes it.
    """
    chat = ChatTokenizer.from_folder(base)
    judging, choosing = _some(rows[::2], ROWS), _some(rows[1::2] or rows, CHOOSING_ROWS)
    longest = max(len(row.ids) for row in rows)
    trained = place(attach_learned(load_model(base, torch.float32), learned, DEQUANTIZED), compute, longest)
    bench = Bench.of(trained, judging, chat, compute)
    del trained
    models = {into: _folded(base, learned, into) for into in (DEQUANTIZED, ORIGINAL)}
    ways: dict[str, Into] = {DEQUANTIZED: DEQUANTIZED, ORIGINAL: ORIGINAL}
    ways[PER_LAYER] = _by_layer(models, choosing, chat, compute, longest)
    del models
    looks, losses = {}, {}
    for name, into in ways.items():
        model: Any = place(_folded(base, learned, into), compute, longest)
        looks[name] = {"as_is": bench.look(model)}
        if bits:
            cut_weights(model, bits)
            looks[name]["cut"] = bench.look(model)
        losses[name] = list(looks[name].values())[-1][1]
    gains = {name: _gain(losses[DEQUANTIZED], loss) for name, loss in losses.items()}
    best = best_way(gains) if wish == "auto" else wish
    found = {
        name: {form: look._asdict() for form, (look, _) in forms.items()}
        | {"less_loss": gains[name][0], "less_loss_error": gains[name][1]}
        for name, forms in looks.items()
    }
    original = [n for n, into in enumerate(ways[PER_LAYER]) if into == ORIGINAL]
    return best, ways[best], {"bits": bits, "rows": len(judging), "original_layers": original, "ways": found}


def best_way(gains: Mapping[str, tuple[float, float]]) -> str:
    """Of ways with what they lose less than the trained one, and its standard error."""
    certain = {name: gain for name, (gain, error) in gains.items() if gain > CERTAIN * error}
    return max(certain, key=lambda name: certain[name], default=DEQUANTIZED)


@torch.no_grad()
def cut_weights(model: Any, bits: int) -> None:
    """Give the decoder's linears the values that they have in so many bits, in place.

    Each block of a row gets a scale and a smallest value, as in GGUF's Q4_1; types with searched scales lose less.
    """
    for _, linear in decoder_linears(model):
        weight = linear.weight
        blocks = weight.float().reshape(-1, math.gcd(weight.shape[1], BLOCK))
        low = blocks.amin(1, keepdim=True)
        step = ((blocks.amax(1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-12)
        weight.copy_((((blocks - low) / step).round() * step + low).view_as(weight))


def _folded(base: Path, learned: Artifact, into: Into) -> Any:
    model = load_model(base, torch.float32)
    merge_learned(model, learned, into)
    return model


def _by_layer(
    models: Mapping[str, Any], rows: Sequence[Encoded], chat: ChatTokenizer, compute: Compute, longest: int
) -> tuple[str, ...]:
    """For each layer the base with which the loss on some rows is lower, to first order half way between the two.

    There the gradient of the loss times the difference of the weights is, but for third-order terms, what the whole
    step of that layer from one to the other changes. One pass forward and backward tells it for all layers.
    """
    middle = models[DEQUANTIZED]
    others = dict(decoder_linears(models[ORIGINAL]))
    steps: dict[str, torch.Tensor] = {}
    middle.requires_grad_(False)
    with torch.no_grad():
        for name, linear in decoder_linears(middle):
            steps[name] = (others[name].weight - linear.weight).to(compute.device, compute.dtype)
            linear.weight.lerp_(others[name].weight, 0.5)
    models[ORIGINAL].to("meta")
    place(middle, compute, longest)
    change = [0.0] * len(middle.get_decoder().layers)

    def add_to(name: str, step: torch.Tensor) -> Any:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            change[layer_number(name)] += float((weight.grad.float() * step.float()).sum())
            weight.grad = None

        return hook

    for name, linear in decoder_linears(middle):
        linear.weight.requires_grad_(True).register_post_accumulate_grad_hook(add_to(name, steps[name]))
    for some in _batches(rows):
        batch = collate(some, chat.pad_id, shared_tokens(rows)).to(compute.device)
        batch_loss(middle, batch).backward()
    return tuple(ORIGINAL if total < 0 else DEQUANTIZED for total in change)


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Encoded], chat: ChatTokenizer, compute: Compute) -> Iterator[Floats]:
    """At the trained positions [P, V], batch by batch."""
    for some in _batches(rows):
        batch = collate(some, chat.pad_id, shared_tokens(rows)).to(compute.device)
        yield answer_logits(model.eval(), batch).float().cpu().numpy()


def _batches(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    return [[rows[i] for i in part] for part in in_parts(range(len(rows)), BATCH_ROWS)]


def _some(rows: Sequence[Encoded], number: int) -> list[Encoded]:
    """At most so many rows, evenly spaced, the alike in length together."""
    chosen = [rows[i * len(rows) // number] for i in range(number)] if len(rows) > number else list(rows)
    return sorted(chosen, key=lambda row: len(row.ids))


def _gain(losses_R: NDArray[np.float64], other_R: NDArray[np.float64]) -> tuple[float, float]:
    """How much lower the other's loss is, and the standard error of that over the rows."""
    less = losses_R - other_R
    error = float(less.std(ddof=1) / math.sqrt(len(less))) if len(less) > 1 else math.inf
    return float(less.mean()), error
