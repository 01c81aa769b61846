"""The prompt contract: a package turns conversations into the same tokens as the model it was made from."""

from __future__ import annotations

from typing import Any

from edgeft.bench.session import Session
from edgeft.errors import DataError, ParityError
from edgeft.text.chat import ChatTokenizer

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [(USER, "Hello")],
    [(SYSTEM, "Answer in one line."), (USER, "  two leading spaces, two trailing  ")],
    [(USER, "first line\nsecond\n\n\tfourth\r\nfifth")],
    [(USER, "12345 and 3.14 on 2024-02-29, $1,299.00 or 7%: it's I'll don't WE'RE")],
    [(USER, "Grüße, naïve café, Ünïcode, 你好世界, Привет, שלום, हिन्दी, e\u0301")],
    [(USER, "👩‍💻🎉 ½ × ∑ → «quotes» “curly” …\u00a0end")],
    [(USER, '{"a": ["b", {"c": null}], "d": "<e> & \\"f\\""}'), (ASSISTANT, "ok\n{}"), (USER, "_x__y = z[0] ** 2")],
    [(SYSTEM, ""), (USER, "one"), (ASSISTANT, "two"), (USER, "three"), (ASSISTANT, "four"), (USER, "five")],
]  # fmt: skip


def check_contract(session: Session, chat: ChatTokenizer) -> int:
    """Compare prompts, answers, their text and the end of a turn; returns the number of conversations compared.

    Raises ParityError with the first difference.
    """
    end_of_turn = chat.answer_ids("")[-1]
    if end_of_turn not in session.stop_ids:
        raise ParityError(
            f"the package does not stop at the end of a turn (token {end_of_turn}), only at {sorted(session.stop_ids)}",
            "answers would never end: report this model",
        )
    compared = 0
    for turns in CONVERSATIONS:
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
        try:
            expected = chat.prompt_ids(messages)
        except DataError:
            continue  # some templates take no system turn
        _same(f"the prompt of {turns[-1][1]!r}", session.prompt_ids(messages), expected)
        answer = chat.answer_ids(turns[-1][1])
        _same(f"the answer {turns[-1][1]!r}", session.answer_ids(turns[-1][1]), answer)
        _same(f"the text of the answer {turns[-1][1]!r}", session.decode(answer), chat.decode(answer))
        compared += 1
    return compared


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        shorter = min(len(found), len(expected))
        at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
        raise ParityError(
            f"{what} differs from the model's own at {at}: {found[at : at + 8]!r}, expected {expected[at : at + 8]!r}",
            "the runtime cuts this tokenizer's text in another way; export in the other format",
        )
