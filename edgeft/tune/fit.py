"""The training loop: one for adapters and for whole models, resumable at the step, the best weights kept.

Weights compute in the training precision; the optimiser moves float32 master copies of those that are of another type.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.autograd.graph import increment_version

from edgeft.errors import DataError
from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.tune.arithmetic import Arithmetic
from edgeft.tune.batches import epoch_batches, in_parts
from edgeft.tune.validation import Validation

CHECKPOINT = "last.safetensors"
BETAS = (0.9, 0.99)
SHOWN = {"tokens_per_s": "tok/s", "gemm_share": "of GEMM rate", "rss_gb": "GB"}
OVERFITTING = 1.05  # times its lowest value that the validation loss may be at the end without a word

LossFunction = Callable[[Sequence[int]], tuple[torch.Tensor, int, int]]  # rows -> summed loss, trained tokens, tokens


class Done(NamedTuple):
    """Work of one step in this process: tokens, and how many of them are trained."""

    tokens: int
    trained: int


@dataclass
class History:
    """What a run went through; `best_step` is the step whose weights were kept."""

    steps: list[dict[str, float]] = field(default_factory=list)  # step, loss (nats per trained token), lr
    evals: list[dict[str, float]] = field(default_factory=list)  # step, loss, exact_match
    best_step: int = 0
    stopped_early: bool = False

    @property
    def best(self) -> dict[str, float]:
        """The evaluation whose weights were kept."""
        return next(e for e in self.evals if e["step"] == self.best_step)


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes and where it is evaluated."""

    total: int
    per_epoch: int
    evaluations: frozenset[int]
    warmup: int
    schedule: str

    @staticmethod
    def of(rows: int, settings: LoopSettings) -> Plan:
        per_epoch = math.ceil(rows / settings.batch_rows)
        total = max(1, round(settings.epochs * per_epoch))
        at = {max(1, round(total * (i + 1) / settings.evaluations)) for i in range(settings.evaluations)}
        return Plan(total, per_epoch, frozenset(at), max(1, round(settings.warmup * total)), settings.schedule)

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then by the schedule; `step` counts from 1. Linear: Bergsma et al. 2025, arXiv:2502.15938."""
        if step <= self.warmup:
            return step / self.warmup
        left = (self.total + 1 - step) / (self.total + 1 - self.warmup)
        return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[self.schedule]


class Masters:
    """The trainable weights, or float32 master copies of them, and the AdamW that moves them."""

    def __init__(self, model: torch.nn.Module, settings: LoopSettings) -> None:
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.copies = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.weights.items()
        }
        matrices = [p for p in self.copies.values() if p.ndim > 1]
        others = [p for p in self.copies.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)
        self._clip, self._lr = settings.clip_norm, settings.lr

    def step(self, lr_factor: float, divide_by: float) -> None:
        """One optimiser step on gradients that are sums over `divide_by` tokens."""
        for name, copy in self.copies.items():
            weight = self.weights[name]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad, copy.grad = None, gradient.to(copy.dtype)
        gradients = [copy.grad for copy in self.copies.values() if copy.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / divide_by
        factor = (self._clip / (norm + 1e-6)).clamp(max=1.0) / divide_by  # as torch clips, and the division at once
        for gradient in gradients:
            gradient.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, weight in self.weights.items():
            if weight is self.copies[name]:
                increment_version(weight)  # which a fused optimiser does not: layers keep what they made of a weight
            else:
                weight.copy_(self.copies[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on, as named tensors."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.copies.items()}
        for name, p in self.copies.items():
            tensors |= {f"{k}/{name}": v for k, v in self.optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, p in self.copies.items():
            p.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[p] = {
                kind: tensors[f"{kind}/{name}"].clone() for kind in ("step", "exp_avg", "exp_avg_sq")
            }
        self._write_back()

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.copies.items()}


def fit(
    model: torch.nn.Module,
    lengths: Sequence[int],
    loss_of: LossFunction,
    validate: Callable[[], Validation],
    settings: LoopSettings,
    checkpoints: Path,
    report: Reporter,
    arithmetic: Arithmetic | None = None,
) -> tuple[dict[str, torch.Tensor], History]:
    """Train; returns the float32 weights that validated best, by parameter name, and the history.

    `lengths` are the rows' lengths in tokens; `loss_of(rows)` gives the summed loss over the trained tokens of
    these rows. With `arithmetic` the share of the machine's rate is shown too. A checkpoint found in `checkpoints` is
    continued, with the same result as an unbroken run.
    Raises DataError if a loss is not finite.
    """
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    plan = Plan.of(len(lengths), settings)
    masters, history, best, start = Masters(model, settings), History(), dict[str, torch.Tensor](), 0
    if (checkpoints / CHECKPOINT).is_file():
        start, history, best = _load_checkpoint(checkpoints / CHECKPOINT, masters)
        report.note(f"resumed at step {start} of {plan.total}")
    saved_at = time.monotonic()
    model.train()
    with report.track("training", plan.total, start) as bar:
        for step in range(start + 1, plan.total + 1):
            if history.stopped_early:
                break
            epoch, position = divmod(step - 1, plan.per_epoch)
            rows = epoch_batches(lengths, settings.batch_rows, settings.seed, epoch)[position]
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout: the same with and without a resume
            began = time.perf_counter()
            loss, done = training_step(accelerator, masters, rows, loss_of, settings.micro_rows, plan.lr_factor(step))
            seconds = time.perf_counter() - began
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss became {loss} at step {step}", "lower the learning rate (train.lr, distill.lr)"
                )
            history.steps.append({"step": step, "loss": loss, "lr": settings.lr * plan.lr_factor(step)})
            pace = {"tokens_per_s": done.tokens / seconds, "rss_gb": psutil.Process().memory_info().rss / 1e9}
            if arithmetic:
                pace["gemm_share"] = arithmetic.share(done.tokens, done.trained, seconds)
            report.metric(step=step, loss=loss, tokens=done.tokens, **{k: float(f"{v:.4g}") for k, v in pace.items()})
            bar.advance(1, loss=loss, **{SHOWN[name]: value for name, value in pace.items()})
            if step in plan.evaluations:
                best = _evaluate(step, validate, masters, history, best, settings)
                last = history.evals[-1]
                report.metric(step=step, validation_loss=last["loss"], exact_match=last["exact_match"])
            if time.monotonic() - saved_at >= settings.checkpoint_minutes * 60 and accelerator.is_main_process:
                _save_checkpoint(checkpoints / CHECKPOINT, step, masters, history, best)
                saved_at = time.monotonic()
    if warning := overfitting(history):
        report.note(warning)
    return best, history


def training_step(
    accelerator: Accelerator,
    masters: Masters,
    rows: Sequence[int],
    loss_of: LossFunction,
    micro_rows: int | None,
    lr_factor: float,
) -> tuple[float, Done]:
    """One global batch, shared between processes; returns the mean loss per trained token and what was done here."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    total, trained, tokens = 0.0, 0, 0
    for part in in_parts(mine, micro_rows or len(rows)):
        loss, num_trained, num_tokens = loss_of(part)
        accelerator.backward(loss)
        total, trained, tokens = total + float(loss.detach()), trained + num_trained, tokens + num_tokens
    sums = torch.tensor([total, float(trained)], dtype=torch.float64)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        for weight in masters.weights.values():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = accelerator.reduce(gradient, "sum")
    masters.step(lr_factor, divide_by=float(sums[1]))
    return float(sums[0] / sums[1]), Done(tokens, trained)


def _evaluate(
    step: int,
    validate: Callable[[], Validation],
    masters: Masters,
    history: History,
    best: dict[str, torch.Tensor],
    settings: LoopSettings,
) -> dict[str, torch.Tensor]:
    """Record a look at the validation rows; returns the weights to keep, the present ones if they are better."""
    history.evals.append({"step": step, **validate()._asdict()})
    ranks = [rank(evaluation, settings.choose_by) for evaluation in history.evals]
    if all(ranks[-1] < earlier for earlier in ranks[:-1]):
        history.best_step, best = step, masters.snapshot()
    since_best = sum(e["step"] > history.best_step for e in history.evals)
    history.stopped_early = since_best >= settings.patience
    return best


def rank(evaluation: dict[str, float], choose_by: str) -> tuple[float, float]:
    """The smaller, the better; of equal shares of right rows the one with the lower loss is better."""
    return (0.0 if choose_by == "loss" else -evaluation["exact_match"], evaluation["loss"])


def overfitting(history: History) -> str | None:
    """A sentence if the validation loss rose after its lowest point while the training loss went on falling."""
    lowest, last = min(history.evals, key=lambda e: e["loss"]), history.evals[-1]
    window = max(1, len(history.steps) // 20)

    def training_loss(step: float) -> float:
        near = [s["loss"] for s in history.steps if step - window < s["step"] <= step]
        return sum(near) / len(near)

    then, now = training_loss(lowest["step"]), training_loss(last["step"])
    if last["loss"] <= OVERFITTING * lowest["loss"] or now >= then:
        return None
    return (
        f"overfitting: validation loss {lowest['loss']:.4f} at step {lowest['step']:.0f}, {last['loss']:.4f} at step "
        f"{last['step']:.0f}, while the training loss fell from {then:.4f} to {now:.4f}; fewer epochs or more rows help"
    )


def _save_checkpoint(path: Path, step: int, masters: Masters, history: History, best: dict[str, torch.Tensor]) -> None:
    """Write beside, then rename: a kill while writing leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = masters.state() | {f"best/{name}": value for name, value in best.items()}
    record = {"step": str(step), "history": json.dumps(asdict(history))}
    beside = path.with_suffix(".writing")
    save_file({name: value.contiguous() for name, value in tensors.items()}, beside, metadata=record)
    beside.replace(path)


def _load_checkpoint(path: Path, masters: Masters) -> tuple[int, History, dict[str, torch.Tensor]]:
    tensors: dict[str, Any] = {}
    with safe_open(path, framework="pt") as file:
        record = file.metadata()
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensors[name] = file.get_tensor(name)
    device = next(iter(masters.copies.values())).device
    tensors = {name: value if name.startswith("step/") else value.to(device) for name, value in tensors.items()}
    masters.restore(tensors)
    best = {name.removeprefix("best/"): value for name, value in tensors.items() if name.startswith("best/")}
    return int(record["step"]), History(**json.loads(record["history"])), best
