from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.contract import check_contract, conversations
from edgeft.bench.conversations import ANSWERED, CONTROL_TEXTS, TEXTS
from edgeft.bench.engines import with_genai, with_minijinja, with_transformers
from edgeft.bench.golden import FILE, greedy, needed_context, write_golden
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.session import Messages, open_session
from edgeft.errors import ParityError
from edgeft.formats.gguf import write_gguf
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import tiny_onnx, write_tiny_llama
from tests.text.tiny import CHATML, write_tokenizer

NUM_CONTROL = len(CONTROL_TEXTS) + 1  # one of the other conversations names control tokens of many models


class Echo:
    """A session that tokenises as the model does, unless told otherwise."""

    runtime = "echo"

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
    everything = len(TEXTS) + len(CONTROL_TEXTS)
    assert everything >= 40 and set(ANSWERED) < set(TEXTS)
    found = check_contract(session, session.chat, {"other": session.chat.prompt_ids})
    assert found == {"echo": everything, "other": everything - NUM_CONTROL}


def test_a_conversation_that_the_template_refuses_is_left_out(tmp_path: Path) -> None:
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    session = echo(tmp_path, refuse + CHATML)
    assert 0 < check_contract(session, session.chat)["echo"] < len(TEXTS)


def test_a_second_bos_in_front_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.prompt_ids = lambda messages: [1, *session.chat.prompt_ids(messages)]
    with pytest.raises(ParityError, match=r"the prompt of 'a word' in echo differs .* at 1"):
        check_contract(session, session.chat)


def test_a_template_that_writes_bos_twice_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path, "{{ bos_token }}" + CHATML)
    with pytest.raises(ParityError, match="'a word' begins with two BOS"):
        check_contract(session, session.chat)


def test_another_engine_that_differs_is_named_with_the_conversation(tmp_path: Path) -> None:
    session = echo(tmp_path)

    def composed(messages: Messages) -> list[int]:
        import unicodedata

        return session.chat.prompt_ids([{**m, "content": unicodedata.normalize("NFC", m["content"])} for m in messages])

    with pytest.raises(ParityError, match="the prompt of 'combining marks' in other differs"):
        check_contract(session, session.chat, {"other": composed})


def test_a_prompt_that_only_ends_early_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.answer_ids = lambda text: session.chat.answer_ids(text)[:-1]
    with pytest.raises(ParityError, match="the answer of 'a word' in echo differs"):
        check_contract(session, session.chat)


def test_a_text_that_comes_back_changed_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.decode = lambda ids: session.chat.decode(ids).strip()
    with pytest.raises(ParityError, match="the text of 'spaces alone' in echo"):
        check_contract(session, session.chat)


def test_a_session_that_lets_users_end_their_turn_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.prompt_ids = lambda messages: session.chat.encode_text(session.chat.render(messages, True))
    with pytest.raises(ParityError, match="the prompt of 'control tokens of many models' in echo"):
        check_contract(session, session.chat)


def test_a_model_whose_own_encoding_lets_users_in_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = echo(tmp_path)
    monkeypatch.setattr(
        ChatTokenizer, "prompt_ids", lambda chat, messages: chat.encode_text(chat.render(messages, True))
    )
    with pytest.raises(ParityError, match="the control tokens in the prompt of 'control tokens of many models'"):
        check_contract(session, session.chat)


def test_a_package_that_never_stops_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.stop_ids = frozenset({0})
    with pytest.raises(ParityError, match=r"does not stop at the end of a turn \(token 2\)"):
        check_contract(session, session.chat)


def test_a_package_that_stops_at_a_word_is_found(tmp_path: Path) -> None:
    session = echo(tmp_path)
    session.stop_ids |= {77}
    with pytest.raises(ParityError, match=r"stops at \[77\]"):
        check_contract(session, session.chat)


def test_llama_cpp_and_transformers_keep_it(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    write_gguf(model, tmp_path / "model.gguf", "f16")
    session = LlamaCppSession(tmp_path / "model.gguf", 1, 256)
    found = check_contract(session, ChatTokenizer.from_folder(model), {"transformers": with_transformers(model)})
    session.close()
    assert found == {"llama.cpp": len(TEXTS) + len(CONTROL_TEXTS), "transformers": len(TEXTS) - 1}


def test_onnxruntime_genai_keeps_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    chat = ChatTokenizer.from_folder(model)
    encode, checked = with_genai(package), 0
    for name, messages in conversations(chat).items():
        if chat.hide(messages).originals or name == "numbers of other scripts":
            continue
        assert encode(messages) == chat.prompt_ids(messages), name
        checked += 1
    assert checked >= 40


@pytest.mark.slow
def test_all_engines_keep_it_with_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    from edgeft.formats.onnx import build_onnx

    chat = ChatTokenizer.from_folder(smollm2)
    build_onnx(smollm2, tmp_path)
    (tmp_path / "gguf").mkdir()
    write_gguf(smollm2, tmp_path / "gguf/model.gguf", "f16")
    engines = {"transformers": with_transformers(smollm2), "onnxruntime-genai": with_genai(tmp_path)}
    for package in (tmp_path, tmp_path / "gguf"):
        session = open_session(package, threads=1, context=64)
        counts = check_contract(session, chat, engines)
        assert counts["transformers"] >= 40 and counts["onnxruntime-genai"] == counts["transformers"] - 1
        session.close()


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{%- endif %}",
        "{%- set ns = namespace(last='') %}{%- for m in messages %}{% set ns.last = m['role'] %}"
        "{{ '<|im_start|>' ~ m['role'].upper() ~ '\n' ~ m['content'].strip() ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt and ns.last != 'assistant' %}{{ '<|im_start|>' }}{% endif %}",
    ],
    ids=["chatml", "default system, trimmed", "methods of Python"],
)
def test_minijinja_renders_the_same(template: str, tmp_path: Path) -> None:
    session = echo(tmp_path, template)
    engine = with_minijinja(tmp_path)
    assert engine and check_contract(session, session.chat, {"minijinja": engine})["minijinja"] > 40


@pytest.mark.parametrize("unknown", ["{% generation %}{% endgeneration %}", "{{ 'a' | wordwrap(79) }}"])
def test_a_template_that_minijinja_cannot_read_is_not_held_against_a_model(unknown: str, tmp_path: Path) -> None:
    assert echo(tmp_path, unknown + CHATML).chat and with_minijinja(tmp_path) is None


def test_golden_answers_can_be_said_again(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    chat = ChatTokenizer.from_folder(model)
    session = open_session(package, threads=1, context=needed_context(chat))
    write_golden(session, chat, tmp_path)
    golden = json.loads((tmp_path / FILE).read_text("utf-8"))
    assert len(golden["conversations"]) == len(TEXTS) + len(CONTROL_TEXTS)
    answered = [c for c in golden["conversations"] if "answer_ids" in c]
    assert [c["name"] for c in answered] == list(ANSWERED)
    for entry in golden["conversations"]:
        assert chat.prompt_ids(entry["messages"]) == entry["prompt_ids"]
    for entry in answered:
        assert greedy(session, entry["prompt_ids"], golden["max_new_tokens"])[0] == entry["answer_ids"]
        assert 0 <= entry["certain"] <= len(entry["answer_ids"])
    session.close()


def test_what_is_certain_ends_where_two_tokens_are_close() -> None:
    import numpy as np

    class Says:
        stop_ids = frozenset({3})

        def __init__(self, *logits: list[float]) -> None:
            self.logits = iter(logits)

        def prefill(self, ids: Any) -> Any:
            return np.array(next(self.logits))

        def step(self, token: int) -> Any:
            return np.array(next(self.logits))

    session: Any = Says([5, 0, 0, 0], [0, 5, 4.5, 0], [5, 0, 0, 0], [0, 0, 0, 9])
    assert greedy(session, [0], 9) == ([0, 1, 0], 1)
    session = Says([5, 0, 0, 0], [0, 5, 0, 0], [5, 0, 0, 0])
    assert greedy(session, [0], 2) == ([0, 1], 2)
