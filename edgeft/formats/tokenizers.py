"""A student that is to learn a teacher's probabilities takes over how the teacher cuts text, if it knows its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgeft.errors import ModelError
from edgeft.formats.hf import copy_tokenizer, read_config, write_json
from edgeft.text.chat import PROBE, ChatTokenizer, read_json, read_template

SAME, FEWER = "same", "same, with fewer added tokens"


def adopt_tokenizer(student: Path, teacher: Path) -> tuple[list[int], dict[str, Any]]:
    """Give the model folder `student` the tokenizer and the chat template of `teacher`, and keep its own ids.

    Returns the teacher's id of each of the student's tokens, and what a manifest tells. Model outputs wider than the
    tokenizer (padding) do not matter, nor do added tokens that only one of the two knows. Raises ModelError if
    vocabulary or merges differ: then no token of one need be a token of the other.
    """
    ours, theirs = _read(student), _read(teacher)
    if difference := _difference(ours, theirs):
        raise _another_tokenizer(difference)
    template_changed = read_template(student) != read_template(teacher)
    copy_tokenizer(teacher, student)
    fewer = not _added(theirs).items() <= _added(ours).items()
    if fewer:
        own = {key: ours[key] for key in ("added_tokens", "post_processor")}
        write_json(student / "tokenizer.json", {**theirs, **own})
    chat, asker = ChatTokenizer.from_folder(student), ChatTokenizer.from_folder(teacher)
    id_of = asker.tokenizer.get_vocab(with_added_tokens=True)
    texts = {i: text for text, i in chat.tokenizer.get_vocab(with_added_tokens=True).items()}
    ids = [id_of[texts[i]] if i in texts else i for i in range(chat.end_id)]
    if [ids[i] for i in chat.prompt_ids(PROBE)] != asker.prompt_ids(PROBE):
        raise _another_tokenizer("the teacher's chat template needs tokens that the student lacks")
    return ids, {
        "tokenizer": FEWER if fewer else SAME,
        "tokens": len(texts),
        "outputs": read_config(student)["vocab_size"],
        "outputs_teacher": read_config(teacher)["vocab_size"],
        "template_of_teacher_taken": template_changed,
    }


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    for part in ("type", "vocab", "merges"):
        if ours["model"].get(part) != theirs["model"].get(part):
            return f"the {part} of their tokenizers differ"
    known, wanted = _added(ours), _added(theirs)
    if not wanted.items() <= known.items() and not known.keys() <= wanted.keys():
        return f"each has added tokens that the other lacks, the student {sorted(known.keys() - wanted.keys())[:3]}"
    return None


def _added(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _read(folder: Path) -> dict[str, Any]:
    """tokenizer.json as this version of the library writes it: older files say the same in other ways."""
    path = folder / "tokenizer.json"
    read_json(path)  # raises ModelError if it is missing or damaged
    value: dict[str, Any] = json.loads(Tokenizer.from_file(str(path)).to_str())
    return value


def _another_tokenizer(why: str) -> ModelError:
    return ModelError(
        f"student.model has another tokenizer than the teacher ({why}), so it cannot learn its token probabilities",
        "set targets.kind: answers, to learn what the teacher writes; or take a student of the teacher's family",
    )
