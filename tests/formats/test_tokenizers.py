"""Which students can learn a teacher's token probabilities: told by vocabulary and merges, not by the width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.errors import ModelError
from edgeft.formats.tokenizers import FEWER, SAME, adopt_tokenizer
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import bpe_tokenizer
from tests.text.tiny import CHATML, write_tokenizer


def folder(path: Path, outputs: int, template: str = CHATML, **added: int) -> Path:
    """A model folder without weights; `added` are tokens added to the tokenizer with their ids."""
    write_tokenizer(path, template, bpe_tokenizer())
    (path / "config.json").write_text(json.dumps({"vocab_size": outputs}))
    edit(path, lambda raw: raw["added_tokens"].extend({**raw["added_tokens"][0], "content": f"<{name}>", "id": i}
                                                      for name, i in added.items()))  # fmt: skip
    return path


def edit(path: Path, change: Any) -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    change(raw)
    (path / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(("teacher", "student"), [(320, 300), (300, 320), (320, 320)])
def test_outputs_of_another_width_make_no_other_tokenizer(tmp_path: Path, teacher: int, student: int) -> None:
    ids, found = adopt_tokenizer(folder(tmp_path / "s", student), folder(tmp_path / "t", teacher))
    assert ids == list(range(ChatTokenizer.from_folder(tmp_path / "t").vocab_size))
    assert found["tokenizer"] == SAME and (found["outputs"], found["outputs_teacher"]) == (student, teacher)
    assert not found["template_of_teacher_taken"]


def test_merges_written_as_text_are_the_same_merges(tmp_path: Path) -> None:
    teacher, student = folder(tmp_path / "t", 320), folder(tmp_path / "s", 320)
    edit(student, lambda raw: raw["model"].update(merges=[" ".join(m) for m in raw["model"]["merges"]]))
    assert adopt_tokenizer(student, teacher)[1]["tokenizer"] == SAME


def test_the_student_is_spoken_to_as_the_teacher_is(tmp_path: Path) -> None:
    other = CHATML.replace("message['role']", "message['role'] | upper")
    teacher, student = folder(tmp_path / "t", 320), folder(tmp_path / "s", 320, other)
    assert adopt_tokenizer(student, teacher)[1]["template_of_teacher_taken"]
    asked = [{"role": "user", "content": "Hi"}]
    expected = ChatTokenizer.from_folder(teacher).prompt_ids(asked)
    assert ChatTokenizer.from_folder(student).prompt_ids(asked) == expected


def test_tokens_that_only_the_teacher_has_are_left_out(tmp_path: Path) -> None:
    end = bpe_tokenizer().get_vocab_size()
    teacher, student = folder(tmp_path / "t", 320, tool=end, think=end + 1), folder(tmp_path / "s", 320, think=end)
    ids, found = adopt_tokenizer(student, teacher)
    assert ids == [*range(end), end + 1] and found["tokenizer"] == FEWER
    assert ChatTokenizer.from_folder(student).encode_text("<think>") == [end]


def test_tokens_that_only_the_student_has_are_forgotten(tmp_path: Path) -> None:
    end = bpe_tokenizer().get_vocab_size()
    teacher, student = folder(tmp_path / "t", 320), folder(tmp_path / "s", 320, think=end)
    ids, found = adopt_tokenizer(student, teacher)
    assert ids == list(range(end)) and found["tokenizer"] == SAME
    assert ChatTokenizer.from_folder(student).end_id == end


def swap(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "the vocab of their tokenizers differ"),
        (lambda raw: raw["model"]["merges"].reverse(), "the merges of their tokenizers differ"),
    ],
)
def test_another_tokenizer_is_refused_and_what_would_do_is_said(tmp_path: Path, change: Any, said: str) -> None:
    teacher, student = folder(tmp_path / "t", 320), folder(tmp_path / "s", 320)
    edit(student, change)
    with pytest.raises(ModelError, match=said) as caught:
        adopt_tokenizer(student, teacher)
    assert "targets.kind: answers" in caught.value.hint


def test_a_template_with_a_token_that_the_student_lacks_is_refused(tmp_path: Path) -> None:
    end = bpe_tokenizer().get_vocab_size()
    teacher = folder(tmp_path / "t", 320, CHATML.replace("<|im_start|>", "<turn>"), turn=end)
    student = folder(tmp_path / "s", 320)
    with pytest.raises(ModelError, match="template needs tokens that the student lacks"):
        adopt_tokenizer(student, teacher)
