"""edgeft's side of the comparison: QLoRA as `edgeft run` trains it. Argument: the job as JSON; prints JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.comparison import Clock
from benchmarks.training.common import SETTINGS, Job, score
from edgeft.formats.hf import load_model
from edgeft.progress import Reporter
from edgeft.tune.arithmetic import Arithmetic
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.fit import fit
from edgeft.tune.int8_layers import EXAMPLE_ROWS, use_int8
from edgeft.tune.losses import batch_loss
from edgeft.tune.methods import make_learner
from edgeft.tune.precision import choose_compute
from edgeft.tune.qlora import FoldedLora, adapter_tensors
from edgeft.tune.validation import Validation


def main() -> None:
    job = Job.load(sys.argv[1])
    torch.set_num_threads(job.threads)
    chat, rows = job.tokens("train")
    lengths, prefix = [len(row.ids) for row in rows], shared_tokens(rows)
    compute = choose_compute(SETTINGS.precision, frozen=True)
    learner = make_learner(load_model(Path(job.base), torch.float32), SETTINGS, compute, max(lengths))

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix)
        return batch_loss(learner.model, batch), len(batch.labels_N), batch.num_tokens

    if compute.int8:
        use_int8(learner.model, FoldedLora, lambda: loss_of(range(EXAMPLE_ROWS)))

    def not_now() -> Validation:
        return Validation(0.0, 0.0)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        clock.start()
        weights, _ = fit(learner.trained, lengths, loss_of, not_now, SETTINGS, Path(folder), Reporter("edgeft"))
        measured = clock.stop(len(rows), sum(len(row.ids) for row in rows))
    rate = max(compute.rate, choose_compute(SETTINGS.precision).rate)  # other work may have disturbed one of the two
    answer_tokens = sum(sum(row.trained) for row in rows)
    own_tokens = sum(lengths) - prefix * len(rows)  # the shared beginning is computed once a step, not once a row
    share = Arithmetic.of(learner.model, rate).share(own_tokens, answer_tokens, measured["seconds"])
    print(json.dumps({**measured, "gemm_share": share, **score(job, adapter_tensors(learner.trained, weights))}))


if __name__ == "__main__":
    main()
