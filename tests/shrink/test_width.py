"""Width cuts: what does nothing costs nothing, what matters stays, and the student is an ordinary model of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgeft.errors import ModelError
from edgeft.shrink.goal import check_kind
from edgeft.shrink.importance import ffn_importance, group_importance, hidden_importance, norm_factors, norms_of
from edgeft.shrink.width import keep_ffn, keep_groups, keep_hidden, loadable, strongest
from tests.shrink.tiny import CONFIGS, logits, rows, tiny_decoder

KINDS = list(CONFIGS)
FFN, GROUPS, HIDDEN = [3, 17, 40, 95], [1, 3], [0, 5, 6, 20, 31, 50, 55, 63]  # parts that are made to do nothing


def without(total: int, gone: list[int]) -> list[int]:
    return [i for i in range(total) if i not in gone]


@torch.no_grad()
def silence_ffn(model: Any, dead: list[int]) -> None:
    """Weights that read or write these channels become zero, in all layers."""
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[dead] = 0
            if linear.bias is not None:
                linear.bias[dead] = 0


@torch.no_grad()
def silence_groups(model: Any, dead: list[int]) -> None:
    for layer in model.model.layers:
        value = layer.self_attn.v_proj
        for group in dead:
            value.weight[8 * group : 8 * group + 8] = 0
            if value.bias is not None:
                value.bias[8 * group : 8 * group + 8] = 0


@torch.no_grad()
def silence_hidden(model: Any, dead: list[int]) -> None:
    model.model.embed_tokens.weight[:, dead] = 0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight[dead] = 0
            if linear.bias is not None:
                linear.bias[dead] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_nothing_is_found_and_goes_without_a_trace(kind: str) -> None:
    model, batches = tiny_decoder(kind, tied=kind != "mistral"), rows()
    silence_ffn(model, FFN), silence_groups(model, GROUPS), silence_hidden(model, HIDDEN)
    before = logits(model)
    ffn, groups = strongest(ffn_importance(model, batches), 92), strongest(group_importance(model, batches), 2)
    hidden = strongest([hidden_importance(model, batches)], 56)
    assert (ffn.removed, groups.removed, hidden.removed) == ([FFN] * 4, [GROUPS] * 4, [HIDDEN])
    assert ffn.lost == groups.lost == [0.0] * 4 and hidden.lost == [0.0]
    torch.testing.assert_close(logits(keep_ffn(model, ffn.kept)), before, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(keep_groups(model, groups.kept)), before, atol=1e-6, rtol=1e-6)
    (kept,) = hidden.kept
    factors = norm_factors(model, batches, torch.tensor(kept))
    assert list(factors.values()) == pytest.approx([(64 / 56) ** 0.5] * 9, rel=1e-4)
    torch.testing.assert_close(logits(keep_hidden(model, kept, factors)), before, atol=2e-5, rtol=2e-5)
    uncompensated = keep_hidden(model, kept, dict.fromkeys(factors, 1.0))
    assert (logits(uncompensated) - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_is_the_identity_and_cutting_leaves_the_teacher_alone(kind: str) -> None:
    model, ones = tiny_decoder(kind), dict.fromkeys(dict(norms_of(tiny_decoder(kind))), 1.0)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    whole = keep_hidden(keep_groups(keep_ffn(model, [list(range(96))] * 4), [list(range(4))] * 4), range(64), ones)
    assert torch.equal(logits(whole), before)
    keep_hidden(keep_groups(keep_ffn(model, [[1, 5]] * 4), [[2]] * 4), [3, 9, 20, 60], ones)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_each_layer_keeps_its_own_strongest_channels_in_their_order() -> None:
    model, batches = tiny_decoder("llama"), rows()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, [90 - number, 7 + number]] *= 50
            layer.self_attn.o_proj.weight[:, 16 * number : 16 * number + 16] *= 50
    assert strongest(ffn_importance(model, batches), 2).kept == [[7 + n, 90 - n] for n in range(4)]
    assert strongest(group_importance(model, batches), 1).kept == [[n] for n in range(4)]
    model = tiny_decoder("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [60, 2]] *= 50
    assert strongest([hidden_importance(model, batches)], 2).kept == [[2, 60]]
    lost = strongest([torch.tensor([1.0, 6.0, 3.0])], 2)
    assert (lost.kept, lost.removed, lost.lost) == ([[1, 2]], [[0]], [pytest.approx(0.1)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_is_saved_and_loaded_as_any_model_of_its_kind(kind: str, tied: bool, tmp_path: Path) -> None:
    model, batches = tiny_decoder(kind, tied), rows()
    student = keep_ffn(model, strongest(ffn_importance(model, batches), 64).kept)
    student = keep_groups(student, strongest(group_importance(student, batches), 3).kept)
    (kept,) = strongest([hidden_importance(student, batches)], 54).kept
    student = loadable(keep_hidden(student, kept, norm_factors(student, batches, torch.tensor(kept))))
    student.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    config = again.config
    shape = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (54, 64, 6, 3) and config.head_dim == 8
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(logits(again), logits(student))
    with torch.no_grad():
        cache = again(torch.arange(1, 15)[None], use_cache=True).past_key_values
        stepped = again(torch.arange(15, 21)[None], past_key_values=cache).logits
    torch.testing.assert_close(stepped, logits(again)[:, 14:], atol=1e-5, rtol=1e-5)


def test_padding_and_the_division_into_batches_do_not_count() -> None:
    model = tiny_decoder("llama")
    together = ffn_importance(model, rows())
    lengths = [b.attention_BT.sum(1).tolist() for b in rows()]
    alone = []
    for batch, own in zip(rows(), lengths, strict=True):
        for row, length in enumerate(own):
            values = ffn_importance(model, [type(batch)(batch.prefix_P, batch.ids_BT[row : row + 1, :length],
                                                        batch.attention_BT[row : row + 1, :length],
                                                        batch.at_N, batch.labels_N)])  # fmt: skip
            alone.append((length, values))
    for layer in range(4):
        mean = sum(n * values[layer] for n, values in alone) / sum(n for n, _ in alone)
        torch.testing.assert_close(together[layer], mean, atol=1e-5, rtol=1e-4)


def test_a_hidden_size_that_transformers_forbids_a_llama_is_written_as_a_mistral(tmp_path: Path) -> None:
    model = tiny_decoder("llama", attention_bias=False, mlp_bias=False, rope_parameters={"rope_theta": 500.0})
    silence_hidden(model, without(64, list(range(44))))
    student = loadable(keep_hidden(model, range(44), dict.fromkeys(dict(norms_of(model)), (64 / 44) ** 0.5)))
    assert student.config.model_type == "mistral" and student.config.sliding_window is None
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=2e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with pytest.raises(ModelError, match="biases and 8 heads cannot have a hidden size of 44.*"):
        loadable(keep_hidden(tiny_decoder("llama"), range(44), dict.fromkeys(dict(norms_of(model)), 1.0)))


def test_a_model_built_otherwise_is_refused_by_name() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="'gpt2' cannot be cut in width; known: llama, mistral"):
        check_kind(other.config)
    with pytest.raises(ModelError, match="gpt2"):
        keep_ffn(other, [[0]])
