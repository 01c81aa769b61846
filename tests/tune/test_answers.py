"""A teacher's answers in conversations: each on what it said before, none that does not end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.text.chat import ChatTokenizer
from edgeft.tune import answers
from edgeft.tune.answers import agree, answer_all
from tests.text.tiny import write_tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("chat")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def says(chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a model: the prompt's letters in capitals and an end; questions marked ! are never answered."""

    def write_on(_: Any, prompts: Sequence[list[int]], limits: Sequence[int], *__: Any) -> list[list[int]]:
        heard = [chat.decode(prompt) for prompt in prompts]
        made = []
        for text, limit in zip(heard, limits, strict=True):
            last = text.rsplit("user\n", 1)[1].removesuffix("\nassistant\n")
            end = [] if "!" in last else chat.answer_ids("")
            made.append([*chat.encode_text(f"{last.upper()} {text.count('user')}" if last != "-" else " "), *end])
            made[-1] = made[-1][:limit]
        return made

    monkeypatch.setattr(answers, "write_on", write_on)


@pytest.mark.usefixtures("says")
def test_every_turn_is_answered_on_what_was_said_before(chat: ChatTokenizer) -> None:
    told = answer_all(
        None,
        chat,
        [
            [user("a"), assistant("label"), user("b"), assistant("label")],
            [{"role": "system", "content": "s"}, user("c"), assistant("label")],
            [user("d"), assistant("label"), user("open")],
        ],
        200,
    )
    assert told[0] == [user("a"), assistant("A 1"), user("b"), assistant("B 2")]
    assert told[1] == [{"role": "system", "content": "s"}, user("c"), assistant("C 1")]
    assert told[2] == [user("d"), assistant("D 1"), user("open"), assistant("OPEN 2")]


@pytest.mark.usefixtures("says")
def test_answers_that_do_not_end_or_say_nothing_are_left_out_with_the_reason(chat: ChatTokenizer) -> None:
    asked = [[user("x!")], [user("-")], [user("y" * 300)], [user("a!"), assistant("l"), user("b"), assistant("l")]]
    assert answer_all(None, chat, asked, 100) == ["unfinished", "empty", "unfinished", "unfinished"]
    assert answer_all(None, chat, [], 100) == []


@pytest.mark.usefixtures("says")
def test_the_limit_is_that_of_the_whole_conversation(chat: ChatTokenizer) -> None:
    length = len(chat.prompt_ids([user("a")])) + len(chat.answer_ids("A 1"))
    assert answer_all(None, chat, [[user("a")]], length) == [[user("a"), assistant("A 1")]]
    assert answer_all(None, chat, [[user("a")]], length - 1) == ["unfinished"]


def test_a_real_model_answers_as_it_would_alone(chat: ChatTokenizer) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[chat.answer_ids("")[0]] *= 3  # ends now and then
    asked = [[user(text)] for text in ("a", "some more", "xyz", "Grüße", "1", "?", "ok", "no no no")]
    together = answer_all(model, chat, asked, 60)
    assert together == [answer_all(model, chat, [row], 60)[0] for row in asked]
    assert {type(told) for told in together} == {str, list}


@pytest.mark.parametrize(
    ("answer", "label", "same"),
    [
        ('{"intent":"a","entities":{}}\nreply', '{"entities": {}, "intent": "a"}\nother', True),
        ('{"intent": "a"}', '{"intent": "b"}', False),
        ("track", "track\nOn it.", True),
        ("track", '{"intent": "track"}', False),
    ],
)
def test_answers_agree_if_their_first_lines_say_the_same(answer: str, label: str, same: bool) -> None:
    assert agree(answer, label) == same
