"""Depth cuts keep what they say, in order, and leave the teacher alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.errors import RecipeError
from edgeft.shrink.depth import keep_layers, spaced_layers


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("total", "keep", "expected"), [(30, 15, 15), (6, 2, [0, 5]), (4, 4, [0, 1, 2, 3]), (5, 3, [0, 2, 4])]
)
def test_kept_layers_are_evenly_spaced_with_both_ends(total: int, keep: int, expected: int | list[int]) -> None:
    layers = spaced_layers(total, keep)
    assert len(set(layers)) == keep
    assert (layers[0], layers[-1]) == (0, total - 1)
    assert max(b - a for a, b in zip(layers, layers[1:], strict=False)) <= -(-total // (keep - 1))
    if isinstance(expected, list):
        assert layers == expected


@pytest.mark.parametrize("keep", [1, 31])
def test_an_impossible_depth_is_refused(keep: int) -> None:
    with pytest.raises(RecipeError, match="30 layers"):
        spaced_layers(30, keep)


def test_a_student_holds_the_teachers_layers_and_decodes_with_a_cache() -> None:
    teacher = tiny()
    student = keep_layers(teacher, [0, 3, 5])
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 6
    for own, kept in zip(student.model.layers, [0, 3, 5], strict=True):
        assert torch.equal(own.mlp.up_proj.weight, teacher.model.layers[kept].mlp.up_proj.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    ids = torch.arange(8)[None]
    with torch.no_grad():
        whole = student(ids).logits[:, -1]
        cache = student(ids[:, :5], use_cache=True).past_key_values
        stepwise = student(ids[:, 5:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(stepwise, whole)


def test_keeping_all_layers_changes_nothing() -> None:
    teacher, ids = tiny(), torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(keep_layers(teacher, list(range(6)))(ids).logits, teacher(ids).logits)
