"""A model's tokenizer and chat template as GGUF metadata, so that llama.cpp gives the same token ids.

Two kinds of tokenizer.json have an equal in llama.cpp: byte-level BPE after one of the ways of cutting words that it
has a name for, and SentencePiece's BPE over characters. Which one a file is, is read from its definition, never from
the model's name; a definition without an equal is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

from edgeft.errors import ModelError
from edgeft.formats.gguf_read import GPT2_SPLIT, LLAMA3_SPLIT
from edgeft.text.chat import ChatTokenizer, read_json, token_text

DIGIT = r"\p{N}"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expressions by which a text is cut into words, one after the other -> llama.cpp's name for them.
WORDS = {
    (DIGIT, GPT2_SPLIT): "smollm",
    (GPT2_SPLIT,): "gpt-2",
    (LLAMA3_SPLIT,): "llama-bpe",
    (QWEN2_SPLIT,): "qwen2",
    (QWEN35_SPLIT,): "qwen35",
    (TEKKEN_SPLIT,): "tekken",
}
IGNORING_MERGES = ("llama-bpe", "tekken")  # a word that is a token is taken whole, whatever the merges say
SENTENCEPIECE = "default"  # llama.cpp's name for no cutting at all
SPACE = "\u2581"  # what SentencePiece writes for a blank


def add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> None:
    """Tokens, merges or scores, special tokens and the chat template of folder `model`.

    Raises ModelError if llama.cpp would tokenise otherwise, or if a token has no place in the model's vocabulary.
    """
    chat = ChatTokenizer.from_folder(model)
    raw = json.loads((model / "tokenizer.json").read_text("utf-8"))
    pre = pre_tokenizer_name(raw)
    sentencepiece = pre == SENTENCEPIECE
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre(pre)
    texts, types = _tokens(raw, vocab_size, model)
    writer.add_token_list(texts)
    if sentencepiece:
        writer.add_token_scores(_scores(raw, vocab_size))
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_add_space_prefix("Prepend" in json.dumps(raw["normalizer"]))
    else:
        writer.add_token_merges([" ".join(pair) for pair in _merges(raw)])
    _add_special(writer, model, chat)
    writer.add_chat_template(chat.template)


def pre_tokenizer_name(raw: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer.json cuts text into words, found by its structure.

    Raises ModelError if llama.cpp would tokenise otherwise, or if that is not known.
    """
    model, normalizer, top = raw["model"], raw.get("normalizer"), raw.get("pre_tokenizer")
    name = None
    if model["type"] == "BPE" and model.get("byte_fallback"):
        if _is_sentencepiece(normalizer, top) and not model.get("ignore_merges"):
            name = SENTENCEPIECE
    elif model["type"] == "BPE" and normalizer in (None, {"type": "NFC"}):
        found = WORDS.get(tuple(_words((top or {}).get("pretokenizers", [top or {}]))))
        if model.get("ignore_merges", False) == (found in IGNORING_MERGES):
            name = found
    if name is None:
        seen = {"model": model["type"], "normalizer": normalizer, "pre_tokenizer": top}
        raise ModelError(
            f"llama.cpp has no known equal of this tokenizer: {json.dumps(seen)[:300]}",
            "choose a base model with the tokenizer of SmolLM, Llama 3, Qwen, Mistral or Gemma, or export to ONNX only",
        )
    return name


def _is_sentencepiece(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Blanks become SentencePiece's sign, perhaps with one in front of every text; nothing else happens to it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer["normalizers"]
    blanks = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return steps in ([replace], [prepend, replace]) and pre_tokenizer in (None, blanks)  # no blank is left to cut at


def _words(steps: list[dict[str, Any]]) -> Iterator[str]:
    """The regular expressions of pre-tokenizer steps that end in bytes; "?" for what has no equal in llama.cpp."""
    for number, step in enumerate(steps, 1):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                yield DIGIT
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(pattern)}}:
                yield pattern
            case {"type": "ByteLevel", "add_prefix_space": False} if number == len(steps):
                if step.get("use_regex", True):
                    yield GPT2_SPLIT
            case _:
                yield "?"
    if steps[-1].get("type") != "ByteLevel":
        yield "?"


def _tokens(raw: dict[str, Any], vocab_size: int, model: Path) -> tuple[list[str], list[gguf.TokenType]]:
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if raw["model"].get("byte_fallback") else set()
    entries = [
        (text, i, gguf.TokenType.BYTE if text in bytes_ else gguf.TokenType.NORMAL)
        for text, i in raw["model"]["vocab"].items()
    ]
    for token in raw["added_tokens"]:
        text, kind = token["content"], gguf.TokenType.USER_DEFINED
        if token["special"] or (text.startswith("<|") and text.endswith("|>")):  # some files forget to say so
            kind = gguf.TokenType.CONTROL
        elif token["normalized"]:
            text = text.replace(SPACE, " ")
        if text == raw["model"].get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        entries.append((text, token["id"], kind))
    for text, i, kind in entries:
        if i >= vocab_size:
            raise ModelError(
                f"{model}: token {text!r} has id {i}, the model knows {vocab_size} tokens",
                "take tokenizer and weights from the same model",
            )
        texts[i], types[i] = text, kind
    return texts, types


def _merges(raw: dict[str, Any]) -> list[list[str]]:
    return [m.split(" ", 1) if isinstance(m, str) else m for m in raw["model"]["merges"]]


def _scores(raw: dict[str, Any], vocab_size: int) -> list[float]:
    """llama.cpp joins the pair whose token scores highest: the earlier a merge stands, the higher its token."""
    merges = _merges(raw)
    scores = [-float(len(merges))] * vocab_size
    for rank in range(len(merges) - 1, -1, -1):
        scores[raw["model"]["vocab"]["".join(merges[rank])]] = -float(rank)
    return scores


def _add_special(writer: gguf.GGUFWriter, model: Path, chat: ChatTokenizer) -> None:
    end_of_turn = chat.answer_ids("")[-1]
    settings = read_json(model / "tokenizer_config.json")
    named = {name: chat.tokenizer.token_to_id(token_text(settings.get(f"{name}_token"))) for name in ("unk", "sep")}
    bos = chat.tokenizer.token_to_id(chat.bos_token) if chat.bos_token else None
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_eos_token_id(end_of_turn)  # many apps stop at this one alone
    writer.add_eot_token_id(end_of_turn)
    if named["unk"] is not None:
        writer.add_unk_token_id(named["unk"])
    if named["sep"] is not None:
        writer.add_sep_token_id(named["sep"])
    writer.add_pad_token_id(chat.pad_id)
    alone = chat.tokenizer.encode("a", add_special_tokens=True).ids
    writer.add_add_bos_token(bos is not None and alone[0] == bos)
    writer.add_add_eos_token(alone[-1] in chat.stop_ids)
