"""The prompt contract: every engine turns conversations into the same tokens as the model that was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeft.bench.conversations import CONTROL_TEXTS, KNOWN_DIFFERENCES, TEXTS, messages_of, with_controls
from edgeft.bench.session import Messages, Session
from edgeft.errors import DataError, ParityError
from edgeft.text.chat import ChatTokenizer

Encoder = Callable[[Messages], list[int]]  # a conversation -> ids up to where the assistant answers


def conversations(chat: ChatTokenizer) -> dict[str, Messages]:
    """All conversations by name, those with control tokens filled with the model's own."""
    by_id = {c.id: c.text for c in chat.controls}
    probe = chat.prompt_ids(messages_of(TEXTS["a word"]))
    start = next((by_id[i] for i in probe if i in by_id), chat.turn_end)
    everything = "".join(c.text for c in chat.controls)
    filled = {name: with_controls(turns, start, chat.turn_end, everything) for name, turns in CONTROL_TEXTS.items()}
    return {name: messages_of(turns) for name, turns in TEXTS.items()} | filled


def check_contract(
    session: Session, chat: ChatTokenizer, engines: Mapping[str, Encoder] | None = None
) -> dict[str, int]:
    """Compare prompts, answers, their text and the ends of turns; returns how many conversations each engine was given.

    `engines` are others that read the same package, by name. They are not given what looks like a control token: most
    take it for one. The session is, and must keep it text. A conversation that the template refuses is left out, and a
    known difference.
    Raises ParityError with the first difference.
    """
    engines = engines or {}
    _check_stops(session, chat)
    counts = dict.fromkeys([session.runtime, *engines], 0)
    for name, messages in conversations(chat).items():
        try:
            expected = chat.prompt_ids(messages)
        except DataError:
            continue
        _check_controls(name, messages, expected, chat)
        _same(f"the prompt of {name!r} in {session.runtime}", session.prompt_ids(messages), expected)
        text = messages[-1]["content"]
        answer = chat.answer_ids(text)
        _same(f"the answer of {name!r} in {session.runtime}", session.answer_ids(text), answer)
        _same(f"the text of {name!r} in {session.runtime}", session.decode(answer), chat.decode(answer))
        counts[session.runtime] += 1
        if chat.hide(messages).originals:
            continue
        for engine, encode in engines.items():
            if (engine, name) in KNOWN_DIFFERENCES:
                continue
            _same(f"the prompt of {name!r} in {engine}", encode(messages), expected)
            counts[engine] += 1
    return counts


def _check_stops(session: Session, chat: ChatTokenizer) -> None:
    end_of_turn = chat.answer_ids("")[-1]
    if end_of_turn not in session.stop_ids:
        raise ParityError(
            f"the package does not stop at the end of a turn (token {end_of_turn}), only at {sorted(session.stop_ids)}",
            "answers would never end: export it again; if that does not help, report this model",
        )
    ordinary = sorted(session.stop_ids - chat.stop_ids - {c.id for c in chat.controls})
    if ordinary:
        raise ParityError(
            f"the package stops at {ordinary}, which are no control tokens of the model",
            "answers would be cut: report this model",
        )


def _check_controls(name: str, messages: Messages, ids: list[int], chat: ChatTokenizer) -> None:
    """One BOS at most, and no control token that would not be there without anything that looks like one."""
    bos = chat.tokenizer.token_to_id(chat.bos_token)
    if bos is not None and ids[:2] == [bos, bos]:
        raise ParityError(f"the prompt of {name!r} begins with two BOS tokens", "mend the model's chat template")
    controls = {c.id for c in chat.controls}
    harmless = [{**message, "content": "x"} for message in messages]
    expected = [i for i in chat.prompt_ids(harmless) if i in controls]
    _same(f"the control tokens in the prompt of {name!r}", [i for i in ids if i in controls], expected)


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        shorter = min(len(found), len(expected))
        at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
        raise ParityError(
            f"{what} differs from the model's own at {at}: {found[at : at + 8]!r}, expected {expected[at : at + 8]!r}",
            "the runtime cuts this tokenizer's text in another way; export in the other format",
        )
