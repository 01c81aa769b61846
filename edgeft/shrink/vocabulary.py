"""Vocabulary cut: the tokens that your rows need and the commonest others; every byte that there is a token for stays,
so any text that could be written before still can be.

In a small model embedding and head are a large part of what is read for every token. Only byte-level BPE tokenizers
(tokenizer.json) are cut: there a token can go without another losing its meaning, if the merges that lead to the kept
ones stay. Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from edgeft.errors import ModelError

VOCABULARY = "vocabulary.json"  # in a student's folder: the teacher's id of each of its tokens, if it has fewer

TokenizerFile = dict[str, Any]  # tokenizer.json


def choose_tokens(tokenizer: TokenizerFile, used: Iterable[int], size: int) -> list[int]:
    """The `size` token ids to keep, ascending; more if more are needed, all if there are fewer.

    Needed are the special tokens, the bytes, and the `used` ids with everything they are merged from. Of the rest those
    are kept that were merged first, which in BPE are the most frequent. Raises ModelError if the tokenizer is no
    byte-level BPE.
    """
    check_tokenizer(tokenizer)
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    merges = [_pair(merge) for merge in tokenizer["model"]["merges"]]
    rank = {pair: number for number, pair in reversed(list(enumerate(merges)))}
    texts = {i: text for text, i in ids.items()}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    kept = special | {i for text, i in ids.items() if len(text) == 1}
    for token in set(used) - special:
        kept |= {token, *(ids[part] for part in _merged_from(texts[token], rank))}
    for left, right in merges:
        if len(kept) >= size:
            break
        kept.add(ids[left + right])
    return sorted(kept)


def cut_tokenizer(tokenizer: TokenizerFile, kept: list[int]) -> TokenizerFile:
    """The tokenizer with only the `kept` ids, renumbered in their order; it writes `kept` tokens as it did before."""
    new = {old: number for number, old in enumerate(kept)}
    cut = copy.deepcopy(tokenizer)
    model = cut["model"]
    model["vocab"] = {text: new[i] for text, i in model["vocab"].items() if i in new}
    model["merges"] = [
        merge for merge in model["merges"] if all(text in model["vocab"] for text in _with_result(*_pair(merge)))
    ]
    for token in cut["added_tokens"]:
        token["id"] = new[token["id"]]
    if padding := cut.get("padding"):
        padding["pad_id"] = new[padding["pad_id"]]
    for template in _templates(cut.get("post_processor")):
        for entry in template["special_tokens"].values():
            entry["ids"] = [new[i] for i in entry["ids"]]
    return cut


def cut_tokenizer_settings(settings: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A tokenizer_config.json with the ids of its added tokens renumbered; those that are not kept are left out."""
    if "added_tokens_decoder" not in settings:
        return settings
    new, added = {old: number for number, old in enumerate(kept)}, settings["added_tokens_decoder"]
    return {**settings, "added_tokens_decoder": {str(new[int(i)]): t for i, t in added.items() if int(i) in new}}


def cut_token_ids(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """A config.json or generation_config.json with its token ids renumbered; ids that are not kept are left out."""
    new = {old: number for number, old in enumerate(kept)}
    cut = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id") and isinstance(value, list):
            cut[key] = [new[i] for i in value if i in new]
        elif key.endswith("_token_id") and value is not None:
            cut[key] = new.get(value)
    return cut


@torch.no_grad()
def cut_embeddings(model: Any, kept: list[int]) -> None:
    """Keep the rows `kept` of embedding and head, in place; the logits of kept tokens stay as they are."""
    rows = torch.tensor(kept)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[rows])
    embedding.num_embeddings, embedding.padding_idx = len(kept), None
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[rows])
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[rows])
    head.out_features = len(kept)
    model.config.vocab_size = len(kept)


def check_tokenizer(tokenizer: TokenizerFile) -> None:
    """Raises ModelError if the tokenizer is no byte-level BPE."""
    model, steps = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    kinds = {step.get("type") for step in steps.get("pretokenizers", [steps])}
    marks = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    if model["type"] != "BPE" or "ByteLevel" not in kinds or marks:
        raise ModelError(
            f"this tokenizer ({model['type']}, {sorted(map(str, kinds))}) is no byte-level BPE: its vocabulary cannot "
            "be cut",
            "leave out student.vocabulary",
        )


def _merged_from(token: str, rank: dict[tuple[str, str], int]) -> Iterator[str]:
    """What BPE makes on its way from the token's bytes to the token, the token included."""
    parts = list(token)
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        at = min(range(len(pairs)), key=lambda i: (rank.get(pairs[i], len(rank)), i))
        if pairs[at] not in rank:  # a token that no merge leads to: it is in the vocabulary for itself
            return
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[at]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files write "a b"
    return left, right


def _with_result(left: str, right: str) -> tuple[str, str, str]:
    return left, right, left + right


def _templates(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a post-processor that name token ids."""
    for step in (processor or {}).get("processors", [processor]):
        if step and step.get("type") == "TemplateProcessing":
            yield step
