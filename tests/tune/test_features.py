"""Matching a teacher's inside: what it costs, whom it moves, and that rows do not see each other in it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.tune.batches import Batch, collate
from edgeft.tune.features import FeatureMatching, hidden_distance, in_teacher_ids, relation_distance
from edgeft.tune.kernels import ROWS_ATTENTION
from edgeft.tune.losses import answer_logits
from tests.tune.test_losses import row

ROWS = [row(5, 6, 7, 8), row(9, 10, 11, 12, 13, 14), row(15, 16, 17)]


def model(layers: int, hidden: int = 32, attention: str = ROWS_ATTENTION, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss(matching: FeatureMatching, student: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    answer_logits(student, batch)
    return matching.loss(batch, batch)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_a_student_that_is_its_teacher_has_nothing_to_match(weights: tuple[float, float]) -> None:
    teacher = model(3)
    student = copy.deepcopy(teacher)
    found = loss(FeatureMatching(student, teacher, *weights), student, collate(ROWS, 0, prefix=3))
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_learning_brings_a_narrower_student_closer_and_leaves_the_teacher_alone(weights: tuple[float, float]) -> None:
    student, teacher = model(2, hidden=16, seed=1), model(4)
    before = copy.deepcopy(teacher.state_dict())
    matching, batch = FeatureMatching(student, teacher, *weights), collate(ROWS, 0, prefix=3)
    optimizer = torch.optim.AdamW([*student.parameters(), *matching.parameters()], lr=1e-2)
    losses = []
    for _ in range(25):
        found = loss(matching, student, batch)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_the_layout_of_a_batch_makes_no_difference(weights: tuple[float, float]) -> None:
    found = []
    for attention in (ROWS_ATTENTION, "eager"):
        student, teacher = model(2, attention=attention, seed=1), model(4, attention=attention)
        matching = FeatureMatching(student, teacher, *weights)
        found.append(loss(matching, student, collate(ROWS, 0, prefix=3)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_projections_learn_and_the_student_and_teacher_are_not_counted_again() -> None:
    matching = FeatureMatching(model(2, hidden=16), model(4), 1.0, 0.0)
    assert [p.shape for p in matching.parameters()] == [(32, 16), (32, 16)]
    assert not list(FeatureMatching(model(2), model(4), 0.0, 1.0).parameters())


def test_the_hidden_distance_counts_in_units_of_the_teachers_mean_square() -> None:
    student, teacher = torch.zeros(5, 8), torch.full((5, 8), 3.0)
    assert float(hidden_distance(student, teacher)) == pytest.approx(5)


def test_relations_are_those_of_a_row_to_what_stands_before_it() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(7, 8), torch.randn(7, 12)
    together = relation_distance(mine, theirs, [3, 4], heads=2)
    apart = [relation_distance(mine[part], theirs[part], [n], 2) * n for part, n in ((slice(3), 3), (slice(3, 7), 4))]
    torch.testing.assert_close(together, sum(apart) / 7)
    later = mine.clone()
    later[2] += 5  # the last token of the first row: the two before it do not see it
    first = relation_distance(mine[:2], theirs[:2], [2], 2)
    torch.testing.assert_close(relation_distance(later[:2], theirs[:2], [2], 2), first)
    assert not torch.isclose(relation_distance(later, theirs, [3, 4], 2), together)


def test_one_token_of_a_row_relates_to_nothing_but_itself() -> None:
    assert float(relation_distance(torch.randn(1, 8), torch.randn(1, 8), [1], 2)) == 0


def test_a_batch_in_the_teachers_ids_holds_the_same_tokens() -> None:
    batch = collate([row(0, 1), row(2, 2)], 0, prefix=0)
    translated = in_teacher_ids(batch, torch.tensor([7, 9, 11, 13]))
    assert translated.ids_BT.tolist() == [[9, 11, 13, 7, 9], [9, 11, 13, 11, 11]]
    assert in_teacher_ids(batch, None) is batch
