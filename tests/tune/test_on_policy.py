"""The student answers, the teacher scores: a step that teaches, that costs what is said, and that resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.learning_settings import LoopSettings
from edgeft.progress import Reporter
from edgeft.shrink.vocabulary import cut_embeddings
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded, encode_row
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.fit import History, LossFunction, fit
from edgeft.tune.losses import Distance, answer_logits, answer_loss
from edgeft.tune.on_policy import LiveTeacher, OnPolicy, Vocabulary, cost, is_own_turn
from edgeft.tune.validation import Validation
from tests.text.tiny import write_tokenizer

END = 259  # tokens of the tiny tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("chat")))


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=END + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(chat: ChatTokenizer) -> list[Encoded]:
    questions = {"Hi": "Hello.", "Who?": "Me", "Where is it": "In the box.", "No": "Yes"}
    said = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        for question, answer in questions.items()
    ]
    return [encode_row(chat, messages, 128, "row") for messages in [*said, (*said[0], *said[1])]]


def live(student: Any, teacher: Any, chat: ChatTokenizer, top_k: int = 16) -> OnPolicy:
    return OnPolicy.of(student, chat, rows(chat), LiveTeacher(teacher, top_k, 1.0, END, None))


def loss_with(asked: OnPolicy, chat: ChatTokenizer, distance: Distance, share: float = 1.0) -> LossFunction:
    """As the distill stage takes it, with the labels alone where the student does not answer."""
    kept = rows(chat)

    def loss_of(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        part, teacher = [kept[i] for i in numbers], None
        if is_own_turn(share):
            part, teacher = asked.ask(part)
        batch = collate(part, chat.pad_id, shared_tokens(kept))
        logits_NV = answer_logits(asked.model, batch)[:, :END]
        return answer_loss(logits_NV, batch.labels_N, teacher, 1.0, distance), len(batch.labels_N), batch.num_tokens

    return loss_of


def test_the_student_answers_the_last_turn_and_its_whole_answer_is_trained(chat: ChatTokenizer) -> None:
    student, given = tiny(1), rows(chat)
    answered, teacher = live(student, tiny(2), chat).ask(given)
    for before, after in zip(given, answered, strict=True):
        start = len(after.ids) - sum(after.trained)
        assert after.ids[:start] == before.ids[:start] and before.trained[start] and not before.trained[start - 1]
        assert after.trained == (False,) * start + (True,) * (len(after.ids) - start)
        assert len(after.ids) <= max(len(row.ids) for row in given) and max(after.ids) < END
        ended = [token in chat.stop_ids for token in after.ids[start:]]
        assert not any(ended[:-1])
    assert len(teacher.tail_N) == sum(sum(row.trained) for row in answered)
    assert any(row.ids != old.ids for row, old in zip(answered, given, strict=True))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "skewed_kl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    chat: ChatTokenizer, kind: Literal["forward_kl", "reverse_kl", "js", "skewed_kl"]
) -> None:
    with torch.no_grad():
        same, other = (
            loss_with(live(tiny(1), tiny(seed), chat), chat, Distance(kind))([0, 1, 2, 3, 4]) for seed in (1, 2)
        )
    assert abs(float(same[0]) / same[1]) < 1e-5
    assert float(other[0]) / other[1] > 0.05


def test_a_student_with_fewer_tokens_is_scored_in_its_own_ids(chat: ChatTokenizer) -> None:
    """Without the ids 240 to 249: its logits are the teacher's, so its probabilities are those given the others."""
    kept = [i for i in range(END) if not 240 <= i < 250]
    student, teacher = tiny(1), tiny(1)
    cut_embeddings(student, kept)
    asked = LiveTeacher(teacher, len(kept) - 1, 1.0, END, Vocabulary(tuple(kept), END + 5))
    row = Encoded((1, 20, 30, 241, 200), (False, False, False, True, True))  # 241 and 248 stand for 251 and 258
    batch = collate([row], 0)
    with torch.no_grad():
        apart, elsewhere = (
            float(answer_loss(answer_logits(student, batch), batch.labels_N, asked.targets([seen]), 1.0))
            for seen in (row, Encoded((1, 20, 31, 241, 200), row.trained))
        )
    assert apart < 1e-3 < 0.05 < elsewhere


def train(
    chat: ChatTokenizer, folder: Path, share: float, kill_at: int | None = None
) -> tuple[dict[str, torch.Tensor], History]:
    student = tiny(1)
    loss_of, calls = loss_with(live(student, tiny(2), chat), chat, Distance("js"), share), 0

    def counted(numbers: Sequence[int]) -> tuple[torch.Tensor, int, int]:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise KeyboardInterrupt
        return loss_of(numbers)

    settings = LoopSettings(epochs=10, lr=5e-3, batch_rows=2, evaluations=1, checkpoint_minutes=0, warmup=0)
    lengths = [len(row.ids) for row in rows(chat)]
    return fit(student, lengths, counted, lambda: Validation(0.0, 0.0), settings, folder, Reporter("test"))


def test_thirty_steps_bring_a_student_nearer_to_its_teacher(chat: ChatTokenizer, tmp_path: Path) -> None:
    _, history = train(chat, tmp_path, share=1.0)
    losses = [step["loss"] for step in history.steps]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_a_killed_run_goes_on_with_the_answers_that_it_would_have_had(chat: ChatTokenizer, tmp_path: Path) -> None:
    expected, unbroken = train(chat, tmp_path / "unbroken", share=0.5)
    with pytest.raises(KeyboardInterrupt):
        train(chat, tmp_path / "killed", share=0.5, kill_at=14)
    torch.manual_seed(99)
    weights, resumed = train(chat, tmp_path / "killed", share=0.5)
    assert resumed == unbroken
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_student_answers_in_the_share_of_steps_that_is_asked_for() -> None:
    turns = []
    for seed in range(400):
        torch.manual_seed(seed)
        turns.append([is_own_turn(share) for share in (0.0, 0.25, 1.0)])
        assert is_own_turn(0.25) == turns[-1][1]
    never, some, always = (sum(column) for column in zip(*turns, strict=True))
    assert (never, always) == (0, 400) and 70 < some < 130


def test_the_cost_is_measured_and_leaves_no_gradient(chat: ChatTokenizer) -> None:
    student = tiny(1)
    asked = live(student, tiny(2), chat)
    ways = {True: loss_with(asked, chat, Distance()), False: loss_with(asked, chat, Distance(), share=0.0)}
    seen = []

    def loss_on(numbers: Sequence[int], own_turn: bool) -> tuple[torch.Tensor, int, int]:
        seen.append((len(numbers), own_turn))
        return ways[own_turn](numbers)

    found = cost(student, loss_on, [0, 1, 2], 0.5)
    assert seen == [(1, False), (3, False), (1, True), (3, True)]
    assert found.own_s > found.cached_s > 0 and found.rows == 3
    assert "50% of such steps" in str(found)
    assert all(p.grad is None for p in student.parameters())
