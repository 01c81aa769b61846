"""Layers chosen by how little they turn the hidden state."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from edgeft.shrink.turning import cosines, least_influence, least_turning_block
from tests.shrink.tiny import rows, tiny_decoder


def test_layers_that_do_nothing_have_no_influence_and_go_first() -> None:
    model = tiny_decoder("llama", attention_bias=False, mlp_bias=False)
    with torch.no_grad():
        for number in (2, 1):
            model.model.layers[number].self_attn.o_proj.weight.zero_()
            model.model.layers[number].mlp.down_proj.weight.zero_()
    cuts = least_influence(model, 1, rows())
    assert sorted(cut.layer for cut in cuts[:2]) == [1, 2] and cuts[2].layer in (0, 3)
    assert [cut.change for cut in cuts[:2]] == pytest.approx([0, 0], abs=1e-6) and cuts[2].change > 0.01
    block = least_turning_block(model, 2, rows())
    assert [cut.layer for cut in block] == [1, 2]
    assert block[0].change == pytest.approx(0, abs=1e-3)
    assert least_influence(model, 4, rows()) == least_turning_block(model, 4, rows()) == []


def test_the_angle_of_a_block_is_that_between_its_first_input_and_its_last_output() -> None:
    model, batches = tiny_decoder("qwen3"), rows()
    by_hand: list[list[torch.Tensor]] = [[], []]
    last: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    for batch in batches:
        with torch.no_grad():
            states = model(batch.ids_BT, batch.attention_BT, output_hidden_states=True).hidden_states
        before = [*states[:4], last[-1]]
        for first in (0, 1):
            cosine = F.cosine_similarity(before[first], before[first + 3], dim=2)
            by_hand[first].append(cosine[batch.attention_BT.bool()])
    hook.remove()
    for found, parts in zip(cosines(model, 3, batches), by_hand, strict=True):
        torch.testing.assert_close(found, torch.cat(parts))
    angles = [float(torch.cat(parts).arccos().mean()) / math.pi for parts in by_hand]
    block = least_turning_block(model, 1, batches)
    assert block[0].layer == angles.index(min(angles)) and len(block) == 3
    assert block[0].change == pytest.approx(min(angles), rel=1e-4)
