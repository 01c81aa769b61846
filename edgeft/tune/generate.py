"""What a model writes itself: many prompts at once, each token once through it, greedily or by chance.

B prompts, T tokens; a prompt shorter than its neighbours is padded on the left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from edgeft.text.chat import ChatTokenizer


@torch.no_grad()
def write_on(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop_ids: Collection[int], end_id: int, *,
    sampled: bool = False,
) -> list[list[int]]:  # fmt: skip
    """The token ids that the model writes after each prompt, up to and including one of `stop_ids`.

    At most `limits` of them for each prompt, all smaller than `end_id` (what stands behind is padding of the
    vocabulary). Greedy, or with `sampled` drawn from the model's probabilities with torch's own random numbers.
    """
    device = model.get_input_embeddings().weight.device
    written: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    ids_BT, seen_BT = _left_padded(prompts, device)
    at_BT, cache = (seen_BT.cumsum(1) - 1).clamp_min(0), DynamicCache(config=model.config)
    with _answering(model):
        while live:
            out = model(
                ids_BT, attention_mask=seen_BT, position_ids=at_BT, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            new_B = _choose(out.logits[:, -1, :end_id], sampled)
            for row, token in zip(live, new_B.tolist(), strict=True):
                written[row].append(token)
            going = [
                place
                for place, row in enumerate(live)
                if written[row][-1] not in stop_ids and len(written[row]) < limits[row]
            ]
            if len(going) < len(live):
                kept = torch.tensor(going, dtype=torch.long, device=device)
                new_B, seen_BT, at_BT = new_B[kept], seen_BT[kept], at_BT[kept]
                cache.batch_select_indices(kept)
                live = [live[place] for place in going]
            ids_BT, at_BT = new_B[:, None], at_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(live), 1)], 1)
    return written


def greedy_answers(model: Any, prompts: Sequence[Sequence[int]], chat: ChatTokenizer, limit: int) -> list[list[int]]:
    """The likeliest token, again and again, up to `limit` or a stop token, which is not part of an answer."""
    if limit < 1 or not prompts:
        return [[] for _ in prompts]
    written = write_on(model, prompts, [limit] * len(prompts), chat.stop_ids, chat.end_id)
    return [ids[:-1] if ids[-1] in chat.stop_ids else ids for ids in written]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and a mask of what is no padding; any id will do as padding, as it is not looked at."""
    width = max(map(len, prompts))
    ids_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    seen_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
        seen_BT[b, width - len(prompt) :] = 1
    return ids_BT.to(device), seen_BT.to(device)


def _choose(logits_BV: torch.Tensor, sampled: bool) -> torch.Tensor:
    if not sampled:
        return logits_BV.argmax(1)
    return torch.multinomial(logits_BV.float().softmax(1), 1).squeeze(1)


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Without dropout and gradient checkpointing, and with an attention that knows a cache."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
