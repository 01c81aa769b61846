"""The counted operations against those that torch counts while a step runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.learning_settings import TrainSettings
from edgeft.text.encode import Encoded
from edgeft.tune.arithmetic import Arithmetic
from edgeft.tune.batches import collate
from edgeft.tune.losses import answer_logits, answer_loss
from edgeft.tune.methods import make_learner
from edgeft.tune.precision import Compute

CPU = Compute(torch.device("cpu"), torch.float32, {"fp32": 1.0})
ROWS = [Encoded(tuple(range(1, 25)), (False,) * 16 + (True,) * 8)] * 4


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "settings", [{}, {"method": "lora", "last_layers": 1}, {"method": "full"}, {"method": "full", "last_layers": 2}]
)
def test_they_are_those_that_torch_counts(settings: dict[str, Any]) -> None:
    """But for the first projections of the first layer that learns (see `Arithmetic.of`): q, k and v, 64 x 128 here."""
    learner = make_learner(model(), TrainSettings(rank=4, alpha=8, precision="fp32", **settings), CPU, 24)
    batch = collate(ROWS, 0)

    def step() -> None:
        answer_loss(answer_logits(learner.model, batch), batch.labels_N).backward()  # type: ignore[no-untyped-call]

    step()  # folds the adapter, which is done once a step and not counted
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for kind, n in counts.items() if kind is not torch.ops.aten.bmm)  # bmm: inside attention
    arithmetic = Arithmetic.of(learner.model, CPU.rate)
    ours = batch.num_tokens * arithmetic.per_token + len(batch.labels_N) * arithmetic.per_answer_token
    first = 0 if settings.get("method") == "full" else 2 * batch.num_tokens * 64 * 128
    assert ours - first == pytest.approx(products, rel=0.002)
    assert arithmetic.share(batch.num_tokens, len(batch.labels_N), 2.0) == pytest.approx(ours / 2e9)
