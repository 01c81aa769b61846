from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.contract import CONVERSATIONS, check_contract
from edgeft.bench.session import Messages
from edgeft.errors import ParityError
from edgeft.text.chat import ChatTokenizer
from tests.text.tiny import CHATML, write_tokenizer


class Echo:
    """A session that tokenises as the model does, unless told otherwise."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat, self.stop_ids = chat, chat.stop_ids

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.chat.prompt_ids(messages)

    def answer_ids(self, text: str) -> list[int]:
        return self.chat.answer_ids(text)

    def decode(self, ids: list[int]) -> str:
        return self.chat.decode(ids)


def echo(folder: Path, template: str = CHATML) -> Any:
    return Echo(ChatTokenizer.from_folder(write_tokenizer(folder, template)))


def test_equal_tokenizers_keep_the_contract(tmp_path: Path) -> None:
    session = echo(tmp_path)
    assert check_contract(session, session.chat) == len(CONVERSATIONS)


def test_a_conversation_that_the_template_refuses_is_left_out(tmp_path: Path) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    session = echo(tmp_path, refuse + CHATML)
    assert 0 < check_contract(session, session.chat) < len(CONVERSATIONS)


def test_a_second_bos_in_front_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.prompt_ids = lambda messages: [1, *session.chat.prompt_ids(messages)]
    with pytest.raises(ParityError, match=r"the prompt of 'Hello' differs .* at 1"):
        check_contract(session, session.chat)


def test_a_prompt_that_only_ends_early_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.answer_ids = lambda text: session.chat.answer_ids(text)[:-1]
    with pytest.raises(ParityError, match="the answer 'Hello' differs"):
        check_contract(session, session.chat)


def test_a_text_that_comes_back_changed_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.decode = lambda ids: session.chat.decode(ids).strip()
    with pytest.raises(ParityError, match="the text of the answer ' *two leading"):
        check_contract(session, session.chat)


def test_a_package_that_never_stops_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.stop_ids = frozenset({0})
    with pytest.raises(ParityError, match=r"does not stop at the end of a turn \(token 2\)"):
        check_contract(session, session.chat)
