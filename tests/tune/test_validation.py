"""Exact match without generating equals what greedy generation gives."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, encode_row
from edgeft.tune.validation import GENERAL_TEXT, first_line, general_text, validate
from tests.text.tiny import write_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def row_of(chat: ChatTokenizer, question: str, answer: list[int]) -> Encoded:
    """A row whose answer has these very tokens."""
    prompt = chat.prompt_ids([{"role": "user", "content": question}])
    return Encoded((*prompt, *answer), (*[False] * len(prompt), *[True] * len(answer)))


def greedy(model: LlamaForCausalLM, chat: ChatTokenizer, question: str, length: int) -> list[int]:
    prompt = torch.tensor([chat.prompt_ids([{"role": "user", "content": question}])])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length)
    return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]


def test_a_row_is_right_if_greedy_decoding_writes_itsfirst_line(chat: ChatTokenizer, model: LlamaForCausalLM) -> None:
    newline, end = chat.encode_text("\n")[0], chat.answer_ids("")[-1]
    said = {question: greedy(model, chat, question, 6) for question in ("a", "bb", "ccc")}
    assert all(not {newline, end} & set(answer) for answer in said.values()), "the test needs plain tokens"
    other = next(i for i in range(40, 60) if i not in said["a"])
    right = [
        row_of(chat, "a", said["a"]),  # without a line end the whole answer counts
        row_of(chat, "bb", said["bb"][:3]),
    ]
    wrong = [
        row_of(chat, "a", [*said["a"][:5], other]),
        row_of(chat, "ccc", [other, *said["ccc"][1:]]),
        row_of(chat, "bb", [*said["bb"], newline, other, end]),  # it does not write the line end
    ]
    assert validate(model, right, chat, CPU).exact_match == 1.0
    assert validate(model, wrong, chat, CPU).exact_match == 0.0
    assert validate(model, [*right, *wrong], chat, CPU).exact_match == pytest.approx(2 / 5)


def test_only_thefirst_line_of_the_last_answer_counts(chat: ChatTokenizer) -> None:
    encoded = encode_row(
        chat,
        [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "first z\nb"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "line\nwith z"},
        ],
        200, "row",
    )  # fmt: skip
    trained = [i for i, flag in zip(encoded.ids, encoded.trained, strict=True) if flag]
    assert chat.decode(trained[first_line(encoded, chat)]) == "line\n"


def test_the_loss_is_the_mean_over_the_trained_tokens(chat: ChatTokenizer, model: LlamaForCausalLM) -> None:
    rows = [row_of(chat, "a", [50, 51, 52]), row_of(chat, "bbbb", [60])]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row.ids])).logits[0]
            at = [t for t, trained in enumerate(row.trained) if trained]
            total += float(F.cross_entropy(logits[[t - 1 for t in at]], torch.tensor(row.ids)[at], reduction="sum"))
    assert validate(model, rows, chat, CPU).loss == pytest.approx(total / 4, rel=1e-5)


def test_a_model_that_knows_nothing_needs_a_full_token_of_bits(chat: ChatTokenizer, model: LlamaForCausalLM) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.lm_head.weight)
    found = general_text(blank, chat, CPU)
    paragraphs = GENERAL_TEXT.read_text("utf-8").strip().split("\n\n")
    size = sum(len(p.encode()) for p in paragraphs)
    assert found.perplexity == pytest.approx(259, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.log2(259) * (size - len(paragraphs)) / size, rel=1e-4)
