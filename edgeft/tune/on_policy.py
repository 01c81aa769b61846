"""On-policy distillation: the student answers, the teacher says how likely each of its tokens was.

GKD (Agarwal et al. 2023, arXiv:2306.13649): the student learns on texts that it would write itself, mistakes included.
The divergence is taken from the teacher's top-k probabilities and the mass of all others, as from cached targets.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded
from edgeft.tune.generate import write_on
from edgeft.tune.losses import TeacherTopK
from edgeft.tune.targets import gather, student_ids, teacher_targets, translate

TIMED_ROWS = 8

LossOn = Callable[[Sequence[int], bool], tuple[torch.Tensor, int, int]]  # rows, whether the student answers


@dataclass(frozen=True)
class Vocabulary:
    """The teacher's id of each of the student's tokens; `vocabulary.json` of a student's folder."""

    teacher_ids: tuple[int, ...]
    teacher_vocab_size: int


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher in memory that scores rows of the student's token ids, in its own top k at a temperature."""

    model: Any
    top_k: int
    temperature: float
    end_id: int
    vocabulary: Vocabulary | None  # None: the ids of both are the same

    def targets(self, rows: Sequence[Encoded]) -> TeacherTopK:
        """Its probabilities at the rows' trained positions, by the student's ids."""
        known, device = self.vocabulary, self.model.get_input_embeddings().weight.device
        if known:
            rows = [Encoded(tuple(known.teacher_ids[i] for i in row.ids), row.trained) for row in rows]
        kept = teacher_targets(self.model, rows, self.top_k, self.temperature, 0, device, self.end_id)
        if known:
            ids_V = student_ids(known.teacher_ids, known.teacher_vocab_size)
            kept = [translate(row, ids_V) for row in kept]
        return gather(kept)


@dataclass(frozen=True)
class OnPolicy:
    """A student that answers the prompts of its training rows itself, and the teacher that listens."""

    model: Any
    chat: ChatTokenizer
    longest_answer: int  # tokens the student may write
    longest_row: int  # tokens of a prompt and an answer together
    teacher: LiveTeacher

    @staticmethod
    def of(model: Any, chat: ChatTokenizer, rows: Sequence[Encoded], teacher: LiveTeacher) -> OnPolicy:
        """An answer may be as long as the longest in `rows`."""
        longest = max(len(row.ids) - _answer_start(row) for row in rows)
        return OnPolicy(model, chat, longest, max(len(row.ids) for row in rows), teacher)

    def ask(self, rows: Sequence[Encoded]) -> tuple[list[Encoded], TeacherTopK]:
        """The rows with a sampled last answer in place of theirs, alone trained, and what the teacher thinks of it."""
        prompts = [row.ids[: _answer_start(row)] for row in rows]
        limits = [min(self.longest_answer, self.longest_row - len(prompt)) for prompt in prompts]
        written = write_on(self.model, prompts, limits, self.chat.stop_ids, self.chat.end_id, sampled=True)
        answered = [
            Encoded((*prompt, *answer), (*[False] * len(prompt), *[True] * len(answer)))
            for prompt, answer in zip(prompts, written, strict=True)
        ]
        return answered, self.teacher.targets(answered)


def is_own_turn(share: float) -> bool:
    """Whether the student answers in this step: so often as `share` says, and each time the same in a resumed run.

    The loop seeds torch with the number of the step, which this reads.
    """
    return random.Random(f"{torch.initial_seed()}/on_policy").random() < share


class Cost(NamedTuple):
    """Seconds of forward and backward pass over some rows: as cached, and with the student's own answers."""

    share: float
    rows: int
    cached_s: float
    own_s: float

    def __str__(self) -> str:
        times = 1 + self.share * (self.own_s / self.cached_s - 1)
        return (
            f"{self.rows} rows take {self.own_s:.2g} s where the student answers, {self.cached_s:.2g} s from cached "
            f"targets; with {self.share:.0%} of such steps training takes about {times:.2g} times as long, and the "
            "teacher stays in memory"
        )


def cost(model: torch.nn.Module, loss_on: LossOn, rows: Sequence[int], share: float) -> Cost:
    """Measured on at most TIMED_ROWS of `rows`, after one row to warm up; nothing is learned."""
    timed = rows[:TIMED_ROWS]
    seconds = {}
    for own_turn in (False, True):
        for part in (timed[:1], timed):
            start = time.perf_counter()
            loss_on(part, own_turn)[0].backward()
            seconds[own_turn] = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
    return Cost(share, len(timed), seconds[False], seconds[True])


def _answer_start(row: Encoded) -> int:
    """Where the last answer starts."""
    return max(i for i, trained in enumerate(row.trained) if trained and not row.trained[i - 1])
