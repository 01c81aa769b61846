"""probe: real rows, general text, and what the torch model predicts on them, frozen for every parity check."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact
from edgeft.errors import ParityError
from edgeft.formats.hf import load_model
from edgeft.formats.parity import descent, summarize, worst_row
from edgeft.formats.probe import Probe
from edgeft.progress import Reporter
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, load_encoded
from edgeft.text.general import general_ids
from edgeft.tune.batches import collate, in_parts, trained_positions
from edgeft.tune.generate import greedy_answers
from edgeft.tune.losses import answer_logits

if TYPE_CHECKING:
    from edgeft.plan import ProbeNode

BATCH_ROWS = 8
GENERAL_TOKENS, GENERAL_WIDTH = 2000, 512
GREEDY_ROWS, GREEDY_TOKENS = 16, 48  # answers that the model writes itself, and their longest


def run(cfg: ProbeNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model, dataset. Writes `probe.safetensors`: float32 reference logits on the CPU."""
    chat = ChatTokenizer.from_folder(inputs["model"].path)
    task = load_encoded(inputs["dataset"].file("validation.jsonl"), chat, cfg.max_tokens)
    numbers = range(1, len(task) + 1)[:: max(1, len(task) // cfg.rows)][: cfg.rows]
    model: Any = load_model(inputs["model"].path, torch.float32).eval()
    longest = int(model.config.max_position_embeddings)
    general = [
        Encoded(tuple(ids), (False, *[True] * (len(ids) - 1)))
        for ids in general_ids(chat, GENERAL_TOKENS, min(GENERAL_WIDTH, longest))
    ]
    rows = [*(task[number - 1] for number in numbers), *general]
    positions = [trained_positions(row) for row in rows]
    probe = Probe(
        [list(row.ids) for row in rows],
        positions,
        _reference(model, rows, chat.pad_id, report),
        [*numbers, *range(1, len(general) + 1)],
        len(general),
    )
    prompts = [probe.prompt(row) for row in range(min(GREEDY_ROWS, probe.task_rows))]
    limit = max(0, min(GREEDY_TOKENS, longest - max(map(len, prompts))))
    probe = replace(probe, greedy=greedy_answers(model, prompts, chat, limit), greedy_limit=limit)
    probe.save(out)
    metrics: dict[str, Any] = {
        "rows": probe.task_rows,
        "positions": sum(map(len, positions[: probe.task_rows])),
        "general_rows": len(general),
        "general_positions": sum(map(len, positions[probe.task_rows :])),
        "greedy_rows": len(probe.greedy),
    }
    if "parent" in inputs:
        metrics["from_parent"] = _from_parent(cfg, probe, chat, inputs, report)
    return metrics


@torch.no_grad()
def _reference(model: Any, rows: list[Encoded], pad_id: int, report: Reporter) -> NDArray[np.float32]:
    """The logits [P, V] at all trained positions."""
    logits_PV = np.empty((sum(sum(row.trained) for row in rows), int(model.config.vocab_size)), np.float32)
    at = 0
    with report.track("reference logits", len(rows)) as bar:
        for part in in_parts(range(len(rows)), BATCH_ROWS):
            logits_NV = answer_logits(model, collate([rows[i] for i in part], pad_id))
            logits_PV[at : at + len(logits_NV)] = logits_NV.numpy()
            at += len(logits_NV)
            bar.advance(len(part))
    return logits_PV


def _from_parent(
    cfg: ProbeNode, probe: Probe, chat: ChatTokenizer, inputs: dict[str, Artifact], report: Reporter
) -> dict[str, Any] | None:
    """How far the model is from the one it was distilled from. It learned the task alone, so only that has a limit.

    None if it has tokens that the other has not: there is nothing to compare them with. Raises ParityError if it is
    further away on validation rows than it may be, or if both tokenizers cut all of them differently.
    """
    parent = ChatTokenizer.from_folder(inputs["parent"].path)
    own, theirs = (side.tokenizer.get_vocab() for side in (chat, parent))
    if not own.keys() <= theirs.keys():
        return None
    parent_ids = [theirs[text] for text in sorted(own, key=own.__getitem__)]
    found = descent(Probe.load(inputs["parent_probe"].path), probe, parent_ids)
    task = {row: part for row, part in found.items() if row < probe.task_rows}
    general = [part for row, part in found.items() if row >= probe.task_rows]
    parity, worst = summarize(list(task.values())), probe.where(list(task)[worst_row(list(task.values()))])
    report.note(f"from its teacher: mean KL {parity.kl_mean:.3f}, same likeliest token {parity.top1:.1%}")
    if cfg.max_kl is not None and not parity.kl_mean <= cfg.max_kl:
        raise ParityError(
            f"the student is not like its teacher: mean KL {parity.kl_mean:.4g} nats over {parity.n_positions} "
            f"positions, at most {cfg.max_kl:g} expected; top-1 agreement {parity.top1:.1%}; worst row {worst}",
            "heal it longer (distill.epochs), cut less, or raise export.max_kl.student if its accuracy is good enough",
        )
    return {**asdict(parity), "general": asdict(summarize(general)) if general else None, "worst_row": worst}
