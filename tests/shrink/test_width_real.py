"""On the real small model, channels chosen by importance keep most of what chance destroys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.formats.hf import load_model
from edgeft.shrink.importance import ffn_importance, group_importance, hidden_importance, norm_factors
from edgeft.shrink.surgery import mean_loss
from edgeft.shrink.width import keep_ffn, keep_groups, keep_hidden, strongest
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import load_encoded
from edgeft.tune.batches import Batch, collate

ROWS = Path(__file__).resolve().parent.parent.parent / "recipes/support-bot/train.jsonl"
Cut = Callable[[Any, list[torch.Tensor], list[Batch]], Any]


def narrow_hidden(model: Any, importance: list[torch.Tensor], rows: list[Batch]) -> Any:
    (kept,) = strongest(importance, 512).kept
    return keep_hidden(model, kept, norm_factors(model, rows, torch.tensor(kept)))


CUTS: dict[str, tuple[Callable[[Any, list[Batch]], list[torch.Tensor]], Cut]] = {
    "ffn 1536 to 1024": (ffn_importance, lambda m, by, _: keep_ffn(m, strongest(by, 1024).kept)),
    "kv_heads 3 to 2": (group_importance, lambda m, by, _: keep_groups(m, strongest(by, 2).kept)),
    "hidden 576 to 512": (lambda m, rows: [hidden_importance(m, rows)], narrow_hidden),
}


@pytest.mark.slow
def test_channels_chosen_by_importance_lose_far_less_than_random_ones(smollm2: Path) -> None:
    chat, model = ChatTokenizer.from_folder(smollm2), load_model(smollm2, torch.float32)
    encoded = load_encoded(ROWS, chat, 512)[:24]
    seen, unseen = ([collate(part, chat.pad_id)] for part in (encoded[:12], encoded[12:]))
    whole, generator = mean_loss(model, unseen), torch.Generator().manual_seed(0)
    for name, (measure, cut) in CUTS.items():
        importance = measure(model, seen)
        chance = [torch.rand(len(values), generator=generator) for values in importance]
        risen = [mean_loss(cut(model, by, seen), unseen) - whole for by in (importance, chance)]
        print(f"{name}: loss {whole:.3f}, by importance +{risen[0]:.3f}, at random +{risen[1]:.3f}")
        assert risen[0] < 0.5 * risen[1], name
