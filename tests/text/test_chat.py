"""Chat templates and tokenizers, against transformers where truth matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from edgeft.errors import DataError, ModelError
from edgeft.text.chat import ChatTokenizer, render_template
from tests.text.tiny import CHATML, SPECIAL, write_tokenizer

QUESTION = [{"role": "user", "content": "Where is order 48-2913?\n\n  Ta!"}]
CONVERSATIONS = [
    QUESTION,
    [{"role": "system", "content": "Be brief."}, *QUESTION],
    [
        *QUESTION,
        {"role": "assistant", "content": '{"intent": "track"}\nOn its way.'},
        {"role": "user", "content": "¿Sí? 日本 🙂"},
    ],
]


@pytest.fixture
def tiny(tmp_path: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_tokenizer(tmp_path))


@pytest.fixture(scope="module")
def real_chat(smollm2: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(smollm2)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_text_and_ids_are_those_of_transformers(smollm2: Path, messages: list[dict[str, str]], prompt: bool) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2)
    chat = ChatTokenizer.from_folder(smollm2)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert chat.render(messages, prompt) == text
    assert chat.encode_text(text) == ids
    if prompt:
        assert chat.prompt_ids(messages) == ids


def test_the_real_model_stops_at_its_end_of_turn_token(real_chat: ChatTokenizer) -> None:
    assert (real_chat.stop_ids, real_chat.turn_end, real_chat.vocab_size) == (frozenset({2}), "<|im_end|>", 49152)
    assert real_chat.answer_ids("Yes.") == [*real_chat.encode_text("Yes."), 2]


# SmolLM2's vocabulary lacks six control characters and the lead bytes of planes without characters.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters="<") | st.sampled_from("\n\t\r"))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_any_text_survives_tokens_and_back(real_chat: ChatTokenizer, texts: list[str]) -> None:
    for text in texts:
        assert real_chat.decode(real_chat.encode_text(text)) == text


def test_end_of_turn_and_end_of_text_both_stop(tiny: ChatTokenizer) -> None:
    assert tiny.stop_ids == {0, 2}
    assert tiny.answer_ids("a")[-1] == 2
    assert tiny.pad_id == 0  # no padding token: end of text takes its place


def test_stop_ids_of_the_generation_config_count_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert ChatTokenizer.from_folder(folder).stop_ids == {0, 1, 2}


def test_special_tokens_are_parsed_and_none_is_added(tiny: ChatTokenizer) -> None:
    ids = tiny.encode_text("<|im_start|>a<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert tiny.decode(ids) == "a"


def test_padding_and_truncation_saved_in_the_tokenizer_do_not_cut_rows(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = ChatTokenizer.from_folder(folder)
    assert [len(chat.encode_text(text)) for text in ("ab", "abcdef")] == [2, 6]


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no special token"):
        ChatTokenizer.from_folder(write_tokenizer(tmp_path, CHATML.replace("<|im_end|>", "")))


def test_a_tokenizer_that_puts_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    letters = sorted({*"▁", *map(chr, range(33, 127))})
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    template = CHATML.replace("\\n", " ").replace("\n", " ")
    with pytest.raises(ModelError, match="other tokens"):
        ChatTokenizer.from_folder(write_tokenizer(tmp_path, template, tokenizer))


def test_the_older_places_of_a_template_are_read(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, template=None)
    for entry in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": entry, "eos_token": {"content": "<|endoftext|>"}})
        )
        assert ChatTokenizer.from_folder(folder).template == CHATML
        assert ChatTokenizer.from_folder(folder).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_tokenizer(tmp_path) / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        ChatTokenizer.from_folder(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        ChatTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "a<b"),
        ("{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}", '{"role": "user", "content": "a<b"}'),
        ("{% if true %}\n  {{ bos_token }}\n  {% endif %}|", "  S\n|"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
    ],
)
def test_what_published_templates_rely_on_works(template: str, text: str) -> None:
    assert render_template(template, [{"role": "user", "content": "a<b"}], False, "S", "E") == text


def test_a_template_cannot_reach_the_interpreter() -> None:
    with pytest.raises(DataError, match="unsafe"):
        render_template("{{ ''.__class__.__mro__ }}", QUESTION, False, "", "")


def test_a_refusal_by_the_template_names_the_roles() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('must alternate') }}{% endif %}"
    with pytest.raises(DataError, match=r"\(system, user\): must alternate"):
        render_template(template, CONVERSATIONS[1], False, "", "")


def test_a_broken_template_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        render_template("{% for %}", QUESTION, False, "", "")
