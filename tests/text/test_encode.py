"""Token ids and loss masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeft.errors import DataError
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, encode_row, load_encoded
from tests.text.tiny import CHATML, write_tokenizer

TWO_ANSWERS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Order 7"},
    {"role": "assistant", "content": "Done."},
]
PLAIN = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tiny")))


def learnt(chat: ChatTokenizer, row: Encoded) -> str:
    ids = [i for i, trained in zip(row.ids, row.trained, strict=True) if trained]
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


def test_only_answers_and_their_end_are_learnt(tiny: ChatTokenizer) -> None:
    row = encode_row(tiny, TWO_ANSWERS, 512, "x:1")
    assert learnt(tiny, row) == "Yes?<|im_end|>Done.<|im_end|>"
    assert len(row.ids) == len(row.trained)


def test_nothing_follows_the_last_learnt_token(tiny: ChatTokenizer) -> None:
    row = encode_row(tiny, TWO_ANSWERS, 512, "x:1")
    assert row.trained[-1]
    assert list(row.ids) == tiny.encode_text(tiny.render(TWO_ANSWERS, False).removesuffix("\n"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=PLAIN, answer=PLAIN)
def test_a_row_is_the_prompt_of_inference_and_then_the_answer(tiny: ChatTokenizer, question: str, answer: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = encode_row(tiny, messages, 512, "x:1")
    prompt = tiny.prompt_ids(messages[:1])
    assert list(row.ids) == prompt + tiny.answer_ids(answer)
    assert list(row.trained) == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))


def test_ids_are_those_of_transformers_on_the_real_model(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    chat = ChatTokenizer.from_folder(smollm2)
    reference = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(TWO_ANSWERS, return_dict=False)
    row = encode_row(chat, TWO_ANSWERS, 512, "x:1")
    assert [*row.ids, *chat.encode_text("\n")] == reference
    assert learnt(chat, row) == "Yes?<|im_end|>Done.<|im_end|>"


def test_an_answer_that_the_template_trims_keeps_its_end(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_folder(
        write_tokenizer(tmp_path, CHATML.replace("message['content']", "message['content'] | trim"))
    )
    row = encode_row(chat, [TWO_ANSWERS[0], {"role": "assistant", "content": "  Yes?  "}], 512, "x:1")
    assert learnt(chat, row) == "Yes?<|im_end|>"


def test_a_template_that_is_no_prefix_of_itself_is_refused(tmp_path: Path) -> None:
    # As templates do that drop the reasoning of earlier turns.
    forgetful = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last or message['role'] == 'user' else '...') +"
    )
    chat = ChatTokenizer.from_folder(write_tokenizer(tmp_path, forgetful))
    with pytest.raises(DataError, match=r"train\.jsonl:7: .* renders the first 4 turns differently"):
        encode_row(chat, TWO_ANSWERS, 512, "train.jsonl:7")


def test_a_row_without_an_answer_is_refused(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="train.jsonl:7: no assistant turn"):
        encode_row(tiny, TWO_ANSWERS[:1], 512, "train.jsonl:7")


def test_a_row_that_is_too_long_is_named_with_its_length(tiny: ChatTokenizer) -> None:
    length = len(encode_row(tiny, TWO_ANSWERS, 512, "x:1").ids)
    assert len(encode_row(tiny, TWO_ANSWERS, length, "x:1").ids) == length
    with pytest.raises(DataError, match=rf"1 row longer than {length - 1} tokens: train.jsonl:7 \({length}\)"):
        encode_row(tiny, TWO_ANSWERS, length - 1, "train.jsonl:7")


def test_all_rows_that_are_too_long_are_named_at_once(tiny: ChatTokenizer, tmp_path: Path) -> None:
    short = TWO_ANSWERS[:2]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": m, "meta": {}}) + "\n" for m in (TWO_ANSWERS, short, TWO_ANSWERS)))
    limit = len(encode_row(tiny, short, 512, "x:1").ids)
    with pytest.raises(
        DataError, match=r"2 rows longer than \d+ tokens: train.jsonl:1 \(\d+\), train.jsonl:3"
    ) as error:
        load_encoded(path, tiny, limit)
    assert f"max_tokens to {len(encode_row(tiny, TWO_ANSWERS, 512, 'x:1').ids)}" in error.value.hint
    assert len(load_encoded(path, tiny, 512)) == 3


def test_rows_with_unicode_line_separators_stay_whole(tiny: ChatTokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d\u2029e"}]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": messages, "meta": {}}, ensure_ascii=False) + "\n", "utf-8")
    assert learnt(tiny, load_encoded(path, tiny, 512)[0]) == "d\u2029e<|im_end|>"
