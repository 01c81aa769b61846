"""Where a training step's CPU time goes: edgeft's step, and PEFT over bitsandbytes with padded rows and all logits.

One thread, the same rows and batches for both; self CPU time by kind of operation, seconds per step.
Run: python -m benchmarks.training.step_profile [steps]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.comparison import MODEL, datasets, other_tools_dtype
from benchmarks.training.common import SETTINGS, Job
from edgeft.formats.hf import load_model
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base
from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, epoch_batches, shared_tokens
from edgeft.tune.fit import Masters, training_step
from edgeft.tune.int8_layers import EXAMPLE_ROWS, use_int8
from edgeft.tune.losses import batch_loss
from edgeft.tune.methods import make_learner
from edgeft.tune.precision import choose_compute
from edgeft.tune.qlora import FoldedLora

KINDS = {  # the first name found in an operation's own decides
    "products inside attention": ("bmm", "attention"),
    "products with weights": ("mm", "mkldnn", "linear", "matmul"),
    "4-bit weights": ("bitsandbytes", "dequantize"),
    "optimiser": ("adam", "optimizer", "clip", "foreach", "norm_"),
    "softmax and loss": ("softmax", "cross_entropy", "nll", "logsumexp", "exp"),
    "copies": ("copy", "cat", "index", "gather", "scatter", "clone", "contiguous", "fill", "zero", "empty", "to"),
    "elementwise": ("mul", "add", "sub", "div", "silu", "neg", "pow", "sqrt", "mean", "sum", "norm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=6, help="steps that are looked at")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "base").mkdir()
        base.run(BaseSettings(model=MODEL), {}, work / "base", Reporter("base"))
        _, dataset = next(datasets(work, None))
        job = Job(str(work / "base"), str(dataset), 8 * (steps + 2), 1)
        _, rows = job.tokens("train")
        batches = epoch_batches([len(row.ids) for row in rows], 8, 0, 0)
        found = {"PEFT over bitsandbytes": theirs(job, rows, batches), "edgeft": ours(job, rows, batches)}
    names = [*KINDS, "everything else"]
    totals = {side: sum(times.values()) for side, times in found.items()}
    print("| seconds per step of 8 rows, 1 thread | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
    for name in names:
        print(
            f"| {name} | " + " | ".join(f"{t[name]:.3f} ({t[name] / totals[s]:.0%})" for s, t in found.items()) + " |"
        )
    print("| together | " + " | ".join(f"{total:.3f}" for total in totals.values()) + " |")


def ours(job: Job, rows: list[Encoded], batches: list[list[int]]) -> Counter[str]:
    prefix, compute = shared_tokens(rows), choose_compute("auto", frozen=True)
    learner = make_learner(load_model(Path(job.base), torch.float32), SETTINGS, compute, max(len(r.ids) for r in rows))
    masters, accelerator = Masters(learner.trained, SETTINGS), Accelerator(cpu=True)

    def loss_of(numbers: Any) -> tuple[torch.Tensor, int, int]:
        batch = collate([rows[i] for i in numbers], 0, prefix)
        return batch_loss(learner.model, batch), len(batch.labels_N), batch.num_tokens

    if compute.int8:
        use_int8(learner.model, FoldedLora, lambda: loss_of(range(EXAMPLE_ROWS)))
    return profiled(lambda batch: training_step(accelerator, masters, batch, loss_of, None, 0.1), batches)


def theirs(job: Job, rows: list[Encoded], batches: list[list[int]]) -> Counter[str]:
    dtype = other_tools_dtype()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(job.base, quantization_config=four_bits, dtype=dtype)
    targets = list(SETTINGS.target_modules)
    model = get_peft_model(model, LoraConfig(r=SETTINGS.rank, lora_alpha=SETTINGS.alpha, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(numbers: list[int]) -> None:
        width = max(len(rows[i].ids) for i in numbers)
        ids, labels, attention = (torch.full((len(numbers), width), fill) for fill in (0, -100, 0))
        for at, i in enumerate(numbers):
            row = rows[i]
            length = len(row.ids)
            ids[at, :length], attention[at, :length] = torch.tensor(row.ids), 1
            labels[at, :length] = torch.where(torch.tensor(row.trained), ids[at, :length], -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return profiled(step, batches)


def profiled(step: Callable[[list[int]], Any], batches: list[list[int]]) -> Counter[str]:
    """Seconds per step by kind of operation, after two steps that are not looked at."""
    for batch in batches[:2]:
        step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for batch in batches[2:]:
            step(batch)
    times: Counter[str] = Counter()
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "everything else")
        times[kind] += event.self_cpu_time_total / 1e6 / len(batches[2:])
    return times


if __name__ == "__main__":
    main()
