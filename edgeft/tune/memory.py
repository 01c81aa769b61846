"""How much memory a training run will need, measured on one row before it starts, and how to stay under a limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from edgeft.errors import RecipeError
from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.batches import epoch_batches, in_parts
from edgeft.tune.fit import LossFunction, Masters
from edgeft.tune.kernels import ROWS_ATTENTION

CHOICE = "memory.json"
BEST = 4  # bytes per trained weight: the best so far, float32
CHECKPOINT = 4 * 4  # the same, its present value and AdamW's two moments once more while a checkpoint is written
OVERHEAD = 1.15  # of what is kept: passing results, and what the allocator loses between rows of many lengths
GB = 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes."""

    resident: int  # program, weights and optimiser
    per_row: int  # kept for the backward pass by each row as long as the longest
    writing: int  # while a checkpoint is written

    def peak(self, rows: float) -> int:
        """With so many of the longest rows computed at once."""
        return self.resident + max(round(self.per_row * rows), self.writing)


def fit_into_memory(
    model: Any,
    trained: torch.nn.Module,
    lengths: Sequence[int],
    loss_of: LossFunction,
    settings: LoopSettings,
    checkpoints: Path,
    report: Reporter,
) -> tuple[LoopSettings, int]:
    """Say what a run will need; returns the settings that keep it under `memory_limit`, and the bytes expected.

    Fewer rows at once come first, then gradient checkpointing on `model` (Chen et al. 2016, arXiv:1604.06174). What
    was chosen is kept beside the checkpoints, so that a resumed run computes as it would have. Raises RecipeError if
    nothing is enough.
    """
    trained.train()
    memory = measure(trained, lengths, loss_of, settings)
    most = min(settings.micro_rows or settings.batch_rows, settings.batch_rows)
    rows, twice, kept = most, False, checkpoints / CHOICE
    if kept.is_file():
        rows, twice = json.loads(kept.read_text("utf-8"))
        memory = recomputing(model, memory, lengths, loss_of) if twice else memory
    elif settings.memory_limit is not None:
        rows = _most_within(model, memory, lengths, settings, most)
        if not rows:
            memory, twice = recomputing(model, memory, lengths, loss_of), True
            rows = _most_within(model, memory, lengths, settings, most)
        if not rows:
            raise RecipeError(
                f"memory_limit: {settings.memory_limit} GB is too little; one row at a time and layers computed twice "
                f"take about {memory.peak(1) / GB:.2f} GB",
                "raise memory_limit, shorten the longest rows, or train less of the model (train.last_layers)",
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(".writing")  # a kill while writing leaves none
        beside.write_text(json.dumps([rows, twice]), "utf-8")
        beside.replace(kept)
    expected = memory.peak(_rows_at_once(model, lengths, settings, rows))
    how = f", {rows} rows at once" * (rows < settings.batch_rows) + ", each layer computed twice" * twice
    report.note(f"needs about {expected / GB:.1f} GB of memory{how}")
    return settings.model_copy(update={"micro_rows": rows}), expected


def measure(trained: torch.nn.Module, lengths: Sequence[int], loss_of: LossFunction, settings: LoopSettings) -> Memory:
    """Of a model that is ready to train: a step that moves nothing on one longest row, then one and two go forward."""
    masters = Masters(trained, settings)
    loss_of([_longest(lengths)])[0].backward()
    masters.step(lr_factor=0.0, divide_by=1.0)
    per_row = round(_kept_per_row(lengths, loss_of) * OVERHEAD)
    example = next(iter(masters.weights.values()))
    used = psutil.Process().memory_info().rss
    if example.device.type == "cuda":
        used = torch.cuda.memory_allocated(example.device)
    numbers = sum(weight.numel() for weight in masters.weights.values())
    return Memory(used + BEST * numbers, per_row, CHECKPOINT * numbers)


def recomputing(model: Any, memory: Memory, lengths: Sequence[int], loss_of: LossFunction) -> Memory:
    """Turn gradient checkpointing on; then a row keeps what goes into each layer, and all of one layer at a time."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    outside = _kept_per_row(lengths, loss_of)  # what checkpointed layers keep is not seen
    layers, width = len(model.get_decoder().layers), model.config.hidden_size
    inputs = layers * width * max(lengths) * next(model.parameters()).element_size()
    return replace(memory, per_row=outside + inputs + (memory.per_row - outside) // layers)


def _longest(lengths: Sequence[int]) -> int:
    return max(range(len(lengths)), key=lambda row: lengths[row])


def _most_within(model: Any, memory: Memory, lengths: Sequence[int], settings: LoopSettings, most: int) -> int:
    """The largest number of rows at once that stays under the limit, 0 if none does."""
    limit = (settings.memory_limit or 0) * GB
    fitting = (n for n in range(most, 0, -1) if memory.peak(_rows_at_once(model, lengths, settings, n)) <= limit)
    return next(fitting, 0)


def _rows_at_once(model: Any, lengths: Sequence[int], settings: LoopSettings, micro_rows: int) -> float:
    """The largest part of a batch that is computed at once, in rows as long as the longest."""
    padded = model.config._attn_implementation != ROWS_ATTENTION
    batches = epoch_batches(lengths, settings.batch_rows, settings.seed, 0)
    parts = ([lengths[row] for row in part] for batch in batches for part in in_parts(batch, micro_rows))
    return max(len(part) * max(part) if padded else sum(part) for part in parts) / max(lengths)


def _kept_per_row(lengths: Sequence[int], loss_of: LossFunction) -> int:
    """Bytes that a second longest row adds to what a forward pass keeps for its backward pass."""
    totals = []
    for count in (1, 2):
        kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

        def note(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of([_longest(lengths)] * count)
        totals.append(sum(storage.nbytes() for storage in kept.values()))
    return totals[1] - totals[0]
