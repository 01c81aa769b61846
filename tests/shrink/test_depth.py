"""Depth cuts keep what they say, in order, and leave the teacher alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from edgeft.errors import RecipeError
from edgeft.shrink.depth import keep_layers, remove_least_needed
from edgeft.text.encode import Encoded
from edgeft.tune.batches import Batch, collate
from edgeft.tune.losses import answer_logits


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = [
        Encoded(tuple(torch.randint(1, 64, (n,), generator=generator).tolist()), tuple(i > 3 for i in range(n)))
        for n in (9, 12, 7)
    ]
    return collate(rows, pad_id=0)


def loss_of_layers(model: LlamaForCausalLM, layers: list[int]) -> float:
    """The slow way: build the cut model and run all of it."""
    with torch.no_grad():
        return float(F.cross_entropy(answer_logits(keep_layers(model, layers), batch()), batch().labels_N))


def test_layers_that_do_nothing_go_first_and_cost_nothing() -> None:
    model = tiny()
    for number, layer in enumerate(model.model.layers):
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            torch.nn.init.normal_(weight, std=0.0 if number in (1, 4) else 0.5)
    torch.nn.init.constant_(model.model.norm.weight, 20.0)  # a confident model, whose own answers are the labels
    with torch.no_grad():
        rows = replace(batch(), labels_N=answer_logits(model, batch()).argmax(1))
    cuts = remove_least_needed(model, 3, rows)
    assert sorted(cut.layer for cut in cuts[:2]) == [1, 4]
    with torch.no_grad():
        whole = float(F.cross_entropy(answer_logits(model, rows), rows.labels_N))
    assert [cut.loss for cut in cuts[:2]] == pytest.approx([whole, whole])
    assert cuts[2].loss > whole + 0.1


def test_each_removed_layer_is_the_least_needed_and_its_loss_that_of_the_cut_model() -> None:
    model, kept = tiny(), list(range(6))
    for module in model.model.layers:  # a random layer hardly matters: make them differ
        torch.nn.init.normal_(module.mlp.down_proj.weight, std=0.5)
    cuts = remove_least_needed(model, 3, batch())
    first = min(kept, key=lambda layer: loss_of_layers(model, [other for other in kept if other != layer]))
    assert cuts[0].layer == first
    for cut in cuts:
        kept.remove(cut.layer)
        assert cut.loss == pytest.approx(loss_of_layers(model, kept), rel=1e-5)
    assert len(model.model.layers) == 6


@pytest.mark.parametrize("keep", [0, 7])
def test_an_impossible_depth_is_refused(keep: int) -> None:
    with pytest.raises(RecipeError, match="6 layers"):
        remove_least_needed(tiny(), keep, batch())


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


def test_what_the_config_says_of_each_layer_goes_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, no_rope_layers=[1, 0, 1, 0], initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    student, ids = keep_layers(SmolLM3ForCausalLM(config).eval(), [1, 2]), torch.arange(8)[None]
    student.save_pretrained(tmp_path)
    again = SmolLM3ForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.no_rope_layers == [0, 1] and len(again.config.layer_types) == 2
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_keeping_all_layers_changes_nothing() -> None:
    teacher, ids = tiny(), torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(keep_layers(teacher, list(range(6)))(ids).logits, teacher(ids).logits)
