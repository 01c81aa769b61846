"""A smaller vocabulary writes kept tokens as before, encodes any text, and leaves the logits of kept tokens alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.errors import ModelError
from edgeft.shrink.vocabulary import (
    choose_tokens,
    cut_embeddings,
    cut_token_ids,
    cut_tokenizer,
    cut_tokenizer_settings,
)
from tests.real_model import smollm2_checkpoint
from tests.text.tiny import SPECIAL

TEXT = "the other mother gathers rather more feathers than the father; where there is weather there is a way. " * 3
ROWS = ["where is the feather?", "the weather is rather bad, mother"]


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE with some sixty merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def file_of(tokenizer: Tokenizer) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(tokenizer.to_str())
    return value


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> set[int]:
    return {i for text in texts for i in tokenizer.encode(text).ids}


def cut_for(texts: list[str], extra: int) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The tokenizer, its cut for `texts` with `extra` tokens more than needed, and the kept ids."""
    whole = trained_tokenizer()
    raw, used = file_of(whole), ids_of(whole, texts)
    needed = len(choose_tokens(raw, used, 0))
    kept = choose_tokens(raw, used, needed + extra)
    assert len(kept) == needed + extra
    return whole, Tokenizer.from_str(json.dumps(cut_tokenizer(raw, kept))), kept


@pytest.mark.parametrize("extra", [0, 5])
def test_rows_are_cut_into_the_same_tokens_as_before(extra: int) -> None:
    whole, cut, kept = cut_for(ROWS, extra)
    for text in [*ROWS, "<|im_start|>the mother<|im_end|>"]:
        assert [kept[i] for i in cut.encode(text).ids] == whole.encode(text).ids
    assert cut.get_vocab_size() == len(kept) < whole.get_vocab_size()


CUT = cut_for(ROWS, 0)[1]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_still_encodes_and_comes_back(text: str) -> None:
    assert CUT.decode(CUT.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_what_is_left_over_goes_to_the_tokens_merged_first() -> None:
    whole = trained_tokenizer()
    raw = file_of(whole)
    kept = choose_tokens(raw, [], 3 + 256 + 10)
    first = {raw["model"]["vocab"]["".join(pair)] for pair in raw["model"]["merges"][:10]}
    assert set(kept) == set(range(3 + 256)) | first


def test_older_files_write_a_merge_as_one_text() -> None:
    raw = file_of(trained_tokenizer())
    older = {**raw, "model": {**raw["model"], "merges": [" ".join(pair) for pair in raw["model"]["merges"]]}}
    kept = choose_tokens(raw, [], 280)
    assert choose_tokens(older, [], 280) == kept
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(older, kept)))
    assert cut.encode(TEXT).ids == Tokenizer.from_str(json.dumps(cut_tokenizer(raw, kept))).encode(TEXT).ids


def test_token_ids_elsewhere_are_renumbered() -> None:
    kept = [1, 2, 7, 9]
    config = {"bos_token_id": 1, "eos_token_id": [9, 5, 2], "pad_token_id": None, "hidden_size": 7}
    assert cut_token_ids(config, kept) == {
        "bos_token_id": 0, "eos_token_id": [3, 1], "pad_token_id": None, "hidden_size": 7,
    }  # fmt: skip
    raw, first = file_of(trained_tokenizer()), {"Sequence": {"id": "A", "type_id": 0}}
    raw["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, first],
                "pair": [first, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}},
            }
        ],
    }  # fmt: skip
    kept = choose_tokens(raw, [], 280)[1:]  # as if another token of lower id had gone
    raw["added_tokens"] = raw["added_tokens"][1:]
    raw["padding"] = {
        "strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }  # fmt: skip
    encoded = Tokenizer.from_str(json.dumps(cut_tokenizer(raw, kept))).encode("a")
    assert encoded.tokens == ["<|im_end|>", "a", *["<|im_end|>"] * 3]
    assert [encoded.ids[0], *encoded.ids[2:]] == [1] * 4
    token = {"content": "<|im_end|>", "special": True}
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"0": {"content": "gone"}, "9": token}}
    assert cut_tokenizer_settings(settings, [1, 2, 7, 9])["added_tokens_decoder"] == {"3": token}
    assert cut_tokenizer_settings({"eos_token": "x"}, [1]) == {"eos_token": "x"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_kept_tokens_stay_as_they_were(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=3,
    )  # fmt: skip
    model, kept = LlamaForCausalLM(config).eval(), [0, 3, 10, 11, 40, 63]
    with torch.no_grad():
        hidden = model.model(torch.tensor([[3, 40, 10, 63]])).last_hidden_state
        expected = model.lm_head(hidden)[..., kept]
        one_by_one = torch.stack([hidden @ model.lm_head.weight[i] for i in kept], -1)
        cut_embeddings(model, kept)
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        for student in (model, again):
            assert torch.equal(student.model(torch.tensor([[1, 4, 2, 5]])).last_hidden_state, hidden)
            torch.testing.assert_close(student(torch.tensor([[1, 4, 2, 5]])).logits, expected, atol=1e-6, rtol=1e-6)
            # bit for bit, if each logit is computed on its own: a product of matrices adds up as suits its width
            assert torch.equal(torch.stack([hidden @ row for row in student.lm_head.weight], -1), one_by_one)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_what_is_needed_is_kept_whatever_the_size_and_no_more_than_there_is() -> None:
    whole = trained_tokenizer()
    raw, used = file_of(whole), ids_of(whole, ROWS)
    assert used | set(range(3 + 256)) <= set(choose_tokens(raw, used, 1))
    assert choose_tokens(raw, used, 10_000) == list(range(whole.get_vocab_size()))


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    raw = json.loads(Tokenizer(models.WordPiece(vocab={"[UNK]": 0})).to_str())
    with pytest.raises(ModelError, match="WordPiece.*no byte-level BPE"):
        choose_tokens(raw, [], 100)


def test_the_real_tokenizer_cut_to_a_third(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = smollm2_checkpoint(tmp_path_factory)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = ["<|im_start|>user\nWhere is order AF-20391?<|im_end|>\n", "Jalapeño kimchi, 12 € — 東京\n\n\tx"]
    kept = choose_tokens(raw, ids_of(whole, rows), 16384)
    cut = Tokenizer.from_str(json.dumps(cut_tokenizer(raw, kept)))
    for text in rows:
        assert [kept[i] for i in cut.encode(text).ids] == whole.encode(text).ids
    common = "The people of the city have worked together for a long time, and they will go on."
    assert [kept[i] for i in cut.encode(common).ids] == whole.encode(common).ids


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """SmolLM2's tokenizer, whole and cut to the least that is possible."""
    folder = smollm2_checkpoint(tmp_path_factory)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    cut = cut_tokenizer(raw, choose_tokens(raw, [], 0))
    return Tokenizer.from_str(json.dumps(raw)), Tokenizer.from_str(json.dumps(cut))


@settings(max_examples=500, deadline=None)
@given(text=st.text(max_size=60))
def test_the_real_tokenizer_writes_any_text_as_before_the_cut(real: tuple[Tokenizer, Tokenizer], text: str) -> None:
    """As before: it has no token for 15 of the 256 bytes, all but six of which are in no character in use."""
    before, after = (t.decode(t.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) for t in real)
    assert after == before
    if not any(c in "\x04\x06\x13\x14\x16\x1d" or 0x40000 <= ord(c) < 0xC0000 for c in text):
        assert after == text
