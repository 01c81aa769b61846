"""A teacher's own answers in conversations (sequence-level distillation: Kim & Rush 2016, arXiv:1606.07947)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeft.text.answer import first_line_json, split_answer
from edgeft.text.chat import ChatTokenizer, Messages
from edgeft.tune.generate import write_on

TOGETHER = 32  # conversations answered at once
UNFINISHED, EMPTY, CONTROL = "unfinished", "empty", "control_token"  # why a conversation is left out

Turns = list[dict[str, str]]


def answer_all(model: Any, chat: ChatTokenizer, asked: Sequence[Messages], max_tokens: int) -> list[Turns | str]:
    """Each conversation with every assistant turn written by the model, greedily, or why it is left out.

    A conversation that ends with a user turn gets one answer more. A later turn is asked on what the model said
    before. Left out is one in which an answer does not end within `max_tokens` of the whole conversation, says
    nothing, or spells out a token that ends a turn.
    """
    parts = [_questions(messages) for messages in asked]
    told: list[Turns] = [[] for _ in asked]
    left_out: dict[int, str] = {}
    for turn in range(max(map(len, parts), default=0)):
        going = [i for i, part in enumerate(parts) if turn < len(part) and i not in left_out]
        for i in going:
            told[i] += parts[i][turn]
        prompts = {i: chat.prompt_ids(told[i]) for i in going}
        for i, answer in _written(model, chat, prompts, max_tokens).items():
            if isinstance(answer, str):
                left_out[i] = answer
            else:
                told[i].append(answer)
    return [left_out.get(i, turns) for i, turns in enumerate(told)]


def agree(answer: str, label: str) -> bool:
    """Whether the first lines of two answers say the same: as JSON objects, or to the letter if one is none."""
    ours, theirs = first_line_json(answer), first_line_json(label)
    if ours is None or theirs is None:
        return split_answer(answer)[0] == split_answer(label)[0]
    return ours == theirs


def _questions(messages: Messages) -> list[Turns]:
    """What stands before each answer; `messages` ends with an answer or with a question that has none."""
    parts: list[Turns] = [[]]
    for message in messages:
        if message["role"] == "assistant":
            parts.append([])
        else:
            parts[-1].append(dict(message))
    return parts[:-1] if messages[-1]["role"] == "assistant" else parts


def _written(
    model: Any, chat: ChatTokenizer, prompts: Mapping[int, list[int]], max_tokens: int
) -> dict[int, dict[str, str] | str]:
    """The assistant's turn after each prompt, or why there is none; prompts of similar length go together."""
    found: dict[int, dict[str, str] | str] = {i: UNFINISHED for i, ids in prompts.items() if len(ids) >= max_tokens}
    order = sorted(prompts.keys() - found.keys(), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), TOGETHER):
        rows = order[start : start + TOGETHER]
        limits = [max_tokens - len(prompts[i]) for i in rows]
        written = write_on(model, [prompts[i] for i in rows], limits, chat.stop_ids, chat.end_id)
        found |= {i: _turn(chat, ids, limit) for i, ids, limit in zip(rows, written, limits, strict=True)}
    return found


def _turn(chat: ChatTokenizer, ids: list[int], limit: int) -> dict[str, str] | str:
    text = chat.decode(ids)
    if ids[-1] not in chat.stop_ids or len(chat.answer_ids(text)) > limit:
        return UNFINISHED
    if not text.strip():
        return EMPTY
    if any(str(chat.tokenizer.id_to_token(stop)) in text for stop in chat.stop_ids):
        return CONTROL
    return {"role": "assistant", "content": text}
