"""TRL's side: SFTTrainer over bitsandbytes' NF4, the same tokens, rank, batch, rate. Argument: the job as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.comparison import Clock, other_tools_dtype
from benchmarks.training.common import SETTINGS, Job, score


class Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()


def main() -> None:
    job = Job.load(sys.argv[1])
    torch.set_num_threads(job.threads)
    _, rows = job.tokens("train")
    dtype = other_tools_dtype()
    data = Dataset.from_list([{"input_ids": list(r.ids), "completion_mask": list(map(int, r.trained))} for r in rows])
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(job.base, quantization_config=four_bits, dtype=dtype)
    lora = LoraConfig(
        r=SETTINGS.rank,
        lora_alpha=SETTINGS.alpha,
        target_modules=list(SETTINGS.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            num_train_epochs=SETTINGS.epochs,
            per_device_train_batch_size=SETTINGS.batch_rows,
            learning_rate=SETTINGS.lr,
            lr_scheduler_type="linear",
            warmup_steps=SETTINGS.warmup,
            adam_beta2=0.99,
            max_grad_norm=SETTINGS.clip_norm,
            max_length=SETTINGS.max_tokens,
            completion_only_loss=True,
            gradient_checkpointing=False,  # off: it would make TRL slower
            bf16=dtype is torch.bfloat16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SETTINGS.seed,
        )
        watch = Stopwatch()
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(job.base),
            peft_config=lora,
            callbacks=[watch],
        )
        trainer.train()
        measured = watch.clock.stop(len(rows), sum(len(row.ids) for row in rows))
    adapter = {name: value.float() for name, value in get_peft_model_state_dict(trainer.model).items()}
    print(json.dumps({**measured, **score(job, adapter)}))


if __name__ == "__main__":
    main()
