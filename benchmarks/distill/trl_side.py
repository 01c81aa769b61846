"""TRL's side: GKDTrainer with the teacher in memory; forward KL on the given answers, the same tokens, batch and rate.

Argument: the job as JSON; prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.comparison import Clock, other_tools_dtype
from benchmarks.distill.common import SETTINGS, Job, freeze_embeddings, score

IGNORED = -100


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()


def padded(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch as GKDTrainer takes it; its prompts are for sampling, which is off."""
    ids, trained = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "trained"))
    ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    trained_BT = pad_sequence(trained, batch_first=True).bool()
    return {
        "input_ids": ids_BT,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": ids_BT.masked_fill(~trained_BT, IGNORED),
    }


def main() -> None:
    job = Job.load(sys.argv[1])
    torch.set_num_threads(job.threads)
    chat, rows = job.tokens("train")
    data = Dataset.from_list([{"input_ids": list(r.ids), "trained": list(map(int, r.trained))} for r in rows])
    # Float32 weights under autocast for what learns, as edgeft has them too: AdamW stalls on bfloat16 ones.
    dtype = other_tools_dtype()
    student = AutoModelForCausalLM.from_pretrained(job.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(job.teacher, dtype=dtype)
    freeze_embeddings(student)
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # on the given answers
            beta=0.0,  # forward KL
            temperature=1.0,
            num_train_epochs=SETTINGS.epochs,
            per_device_train_batch_size=SETTINGS.batch_rows,
            learning_rate=SETTINGS.lr,
            lr_scheduler_type="linear",
            warmup_steps=SETTINGS.warmup,
            adam_beta2=0.99,
            max_grad_norm=SETTINGS.clip_norm,
            gradient_checkpointing=False,  # off: it would make TRL slower
            bf16=dtype is torch.bfloat16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SETTINGS.seed,
        )
        watch = Stopwatch()
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=data,
            data_collator=lambda batch: padded(batch, chat.pad_id),
            processing_class=AutoTokenizer.from_pretrained(job.student),
            callbacks=[watch],
        )
        trainer.train()
        measured = watch.clock.stop(len(rows), sum(len(row.ids) for row in rows))
    weights = {name: p.detach().float() for name, p in trainer.model.named_parameters() if p.requires_grad}
    print(json.dumps({**measured, **score(job, weights)}))


if __name__ == "__main__":
    main()
