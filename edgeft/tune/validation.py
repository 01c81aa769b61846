"""How well a model predicts what it does not learn: validation rows, and general text, which shows what it forgot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, encode_text
from edgeft.text.general import PARAGRAPHS as GENERAL_TEXT
from edgeft.tune.batches import collate, ordered_batches, shared_tokens, trained_positions
from edgeft.tune.losses import CHUNK_ROWS, answer_logits

EVAL_TOKENS = 2048  # padded tokens per evaluation batch


class Validation(NamedTuple):
    """`loss`: mean cross-entropy (nats) per trained token. `exact_match`: share of rows whose first line is right.

    The first line of a row's last answer counts as right if the model, answering greedily, writes its very tokens:
    it does so exactly if each of them is the likeliest after those before it, so that nothing need be generated.
    """

    loss: float
    exact_match: float


@torch.no_grad()
def validate(model: Any, rows: Sequence[Encoded], chat: ChatTokenizer, device: torch.device) -> Validation:
    """Loss and exact match of `rows`."""
    was_training = model.training
    model.eval()
    total, count, exact, prefix = 0.0, 0, 0, shared_tokens(rows)
    for numbers in ordered_batches([len(row.ids) for row in rows], EVAL_TOKENS):
        batch = collate([rows[i] for i in numbers], chat.pad_id, prefix).to(device)
        logits_NV, right = answer_logits(model, batch), []
        for logits, labels in zip(logits_NV.split(CHUNK_ROWS), batch.labels_N.split(CHUNK_ROWS), strict=True):
            total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            right.append(logits.argmax(1) == labels)
        count += len(batch.labels_N)
        per_row = torch.cat(right).split([len(trained_positions(rows[i])) for i in numbers])
        for i, right_N in zip(numbers, per_row, strict=True):
            exact += bool(right_N[first_line(rows[i], chat)].all())
    model.train(was_training)
    return Validation(total / count, exact / len(rows))


class General(NamedTuple):
    """A model on general text: perplexity per token, and bits per byte, which any two tokenizers may be compared by."""

    perplexity: float
    bits_per_byte: float


def general_text(model: Any, chat: ChatTokenizer, device: torch.device) -> General:
    """How well a model predicts the paragraphs of `text/general.txt`, each on its own, without a chat around it."""
    paragraphs = GENERAL_TEXT.read_text("utf-8").strip().split("\n\n")
    rows = [encode_text(chat, paragraph) for paragraph in paragraphs]
    loss = validate(model, rows, chat, device).loss
    tokens = sum(len(row.ids) - 1 for row in rows)
    return General(math.exp(loss), loss * tokens / math.log(2) / sum(len(p.encode()) for p in paragraphs))


def first_line(row: Encoded, chat: ChatTokenizer) -> slice:
    """Where the tokens of the last answer's first line stand among a row's trained tokens, its line end included."""
    start = max(i for i, trained in enumerate(row.trained) if trained and not row.trained[i - 1])
    before, answer = sum(row.trained[:start]), row.ids[start:]
    length = next((n for n in range(1, len(answer)) if "\n" in chat.decode(answer[:n])), len(answer))
    return slice(before, before + length)
