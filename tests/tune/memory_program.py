"""A training run of a few steps in a process of its own; prints what was expected and what was taken, as JSON.

Arguments: the limit in GB or null, and the folder of the checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.errors import RecipeError
from edgeft.learning_settings import TrainSettings
from edgeft.progress import Reporter
from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate
from edgeft.tune.fit import Masters, training_step
from edgeft.tune.losses import batch_loss
from edgeft.tune.memory import fit_into_memory
from edgeft.tune.methods import make_learner
from edgeft.tune.precision import Compute

CPU = Compute(torch.device("cpu"), torch.float32, {"fp32": 1.0})
BATCH, LONG = 4, 250


ROW = Encoded(tuple(range(LONG)), (False,) * (LONG // 2) + (True,) * (LONG - LONG // 2))


def main() -> dict[str, object]:
    limit, checkpoints = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=384, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    cfg = TrainSettings(rank=4, batch_rows=BATCH, precision="fp32", memory_limit=limit)
    rows = [ROW] * BATCH
    learner = make_learner(LlamaForCausalLM(config), cfg, CPU, LONG)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], 0)
        return batch_loss(learner.model, batch), len(batch.labels_N), batch.num_tokens

    lengths = [len(r.ids) for r in rows]
    try:
        settings, expected = fit_into_memory(
            learner.model, learner.trained, lengths, loss_of, cfg, checkpoints, Reporter("train")
        )
    except RecipeError as error:
        return {"error": str(error)}
    masters, accelerator = Masters(learner.trained, settings), Accelerator(cpu=True)
    for _ in range(3):
        training_step(accelerator, masters, range(BATCH), loss_of, settings.micro_rows, 0.1)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return {
        "expected": expected,
        "peak": int(status["VmHWM"].split()[0]) * 1024,
        "rows": settings.micro_rows,
        "twice": learner.model.is_activation_checkpointing,
    }


if __name__ == "__main__":
    print(json.dumps(main()))
