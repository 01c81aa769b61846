from __future__ import annotations

from typing import Any

import pytest

from edgeft.errors import ModelError
from edgeft.formats.gguf_read import GPT2_SPLIT, LLAMA3_SPLIT
from edgeft.formats.gguf_vocab import QWEN2_SPLIT, pre_tokenizer_name


def raw_tokenizer(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"normalizer": None, "pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", **model}}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [{**step, **changes}, BYTES]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def test_the_way_of_cutting_words_is_found_by_structure() -> None:
    assert pre_tokenizer_name(raw_tokenizer(GPT2)) == "gpt-2"
    assert pre_tokenizer_name(raw_tokenizer(split(GPT2_SPLIT))) == "gpt-2"
    assert pre_tokenizer_name(raw_tokenizer({"pretokenizers": [DIGITS, GPT2]})) == "smollm"
    assert pre_tokenizer_name(raw_tokenizer(split(LLAMA3_SPLIT), ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(raw_tokenizer(split(QWEN2_SPLIT))) == "qwen2"


@pytest.mark.parametrize(
    "raw",
    [
        raw_tokenizer({"type": "Metaspace"}),
        raw_tokenizer(split("[a-z]+")),
        raw_tokenizer(split(GPT2_SPLIT, behavior="Removed")),
        raw_tokenizer({"pretokenizers": split(GPT2_SPLIT)["pretokenizers"][:1]}),
        raw_tokenizer({**GPT2, "add_prefix_space": True}),
        raw_tokenizer({"pretokenizers": [GPT2, DIGITS]}),
        raw_tokenizer({"pretokenizers": [{**DIGITS, "individual_digits": False}, GPT2]}),
        raw_tokenizer(GPT2, byte_fallback=True),
        raw_tokenizer(GPT2, ignore_merges=True),
        {**raw_tokenizer(GPT2), "normalizer": {"type": "Lowercase"}},
        {**raw_tokenizer(GPT2), "model": {"type": "Unigram"}},
    ],
)
def test_a_tokenizer_that_llamacpp_would_read_otherwise_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no known equal"):
        pre_tokenizer_name(raw)
