"""edgeft's side of the comparison: a student on cached targets, as `edgeft run` trains it.

Argument: the job as JSON; prints JSON. The teacher is never loaded; the time it took to make the targets is told apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.comparison import Clock
from benchmarks.distill.common import SETTINGS, Job, freeze_embeddings, score
from edgeft.formats.hf import load_model
from edgeft.progress import Reporter
from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.fit import fit
from edgeft.tune.int8_layers import EXAMPLE_ROWS, use_int8
from edgeft.tune.losses import Distance, answer_logits, answer_loss, batch_loss
from edgeft.tune.precision import choose_compute, place
from edgeft.tune.targets import RowTargets, gather, load_shard
from edgeft.tune.validation import Validation

DENSE_ROWS = 64  # on which the cached targets are held against all of the teacher's probabilities


def main() -> None:
    job = Job.load(sys.argv[1])
    torch.set_num_threads(job.threads)
    chat, rows = job.tokens("train")
    index = json.loads((Path(job.targets) / "index.json").read_text("utf-8"))
    targets = [row for shard in index["shards"] for row in load_shard(Path(job.targets) / shard)]
    lengths, prefix, compute = [len(row.ids) for row in rows], shared_tokens(rows), choose_compute(SETTINGS.precision)
    student = place(load_model(Path(job.student), compute.dtype), compute, max(lengths))
    freeze_embeddings(student)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix)
        teacher = gather([targets[i] for i in numbers])
        loss = batch_loss(student, batch, teacher, SETTINGS.teacher_weight)
        return loss, len(batch.labels_N), batch.num_tokens

    if compute.int8:
        use_int8(student, nn.Linear, lambda: loss_of(range(EXAMPLE_ROWS)))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        clock.start()
        weights, _ = fit(
            student, lengths, loss_of, lambda: Validation(0.0, 0.0), SETTINGS, Path(folder), Reporter("edgeft")
        )
        measured = clock.stop(len(rows), sum(lengths))
    apart = loss_by_targets(student, job, rows[:DENSE_ROWS], targets[:DENSE_ROWS], chat.pad_id)
    print(json.dumps({**measured, **score(job, weights), "loss_vs_dense": apart}))


@torch.no_grad()
def loss_by_targets(student: Any, job: Job, rows: list[Encoded], targets: list[RowTargets], pad_id: int) -> float:
    """KL from the teacher by its cached tokens and tail, as a part of that by all its probabilities."""
    compute = choose_compute(SETTINGS.precision)
    teacher = place(load_model(Path(job.teacher), compute.dtype), compute, max(len(row.ids) for row in rows))
    cached, dense = 0.0, 0.0
    for row, kept in zip(rows, targets, strict=True):
        batch = collate([row], pad_id)
        logits_NV = answer_logits(student.eval(), batch)
        cached += float(answer_loss(logits_NV, batch.labels_N, gather([kept]), 1.0, Distance()))
        log_q, log_p = (logits.float().log_softmax(1) for logits in (logits_NV, answer_logits(teacher, batch)))
        dense += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return cached / dense


if __name__ == "__main__":
    main()
