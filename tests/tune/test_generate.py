"""What a model writes: the tokens that transformers' own generation writes, row by row, whoever the neighbours are."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.tune.generate import write_on
from edgeft.tune.precision import Compute, place

VOCABULARY, END = 64, 60
PROMPTS = [[1, 2, 3, 9, 17], [1, 2, 30], [1, 2, 3, 4, 5, 6, 7, 8, 40, 41], [1, 50, 2]]


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def alone(model: LlamaForCausalLM, prompt: list[int], stops: list[int], limit: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=stops or None,
        suppress_tokens=list(range(END, VOCABULARY)),
    )  # fmt: skip
    return list(map(int, out[0, len(prompt) :]))


def test_rows_are_answered_as_each_would_be_alone() -> None:
    model = place(tiny(), Compute(torch.device("cpu"), torch.float32, {"fp32": 1.0}), 32)
    limits = [12, 5, 9, 1]
    free = [alone(tiny(), p, [], n) for p, n in zip(PROMPTS, limits, strict=True)]
    stops = [free[0][4], free[2][2]]  # so that rows end at different times
    expected = [alone(tiny(), p, stops, n) for p, n in zip(PROMPTS, limits, strict=True)]
    model.train()
    attention = model.config._attn_implementation
    assert write_on(model, PROMPTS, limits, stops, END) == expected
    assert len({len(row) for row in expected}) > 2
    assert model.training and model.config._attn_implementation == attention


def test_padding_of_the_vocabulary_is_never_written() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[END:] = 100 * model.lm_head.weight[0]  # far likelier than anything else, or far less
        model.lm_head.weight[END + 1 :] *= -1
    assert any(token >= END for row in write_on(model, PROMPTS, [8] * 4, [], VOCABULARY) for token in row)
    for sampled in (False, True):
        assert all(token < END for row in write_on(model, PROMPTS, [8] * 4, [], END, sampled=sampled) for token in row)


def test_samples_follow_the_model_and_the_seed() -> None:
    model, count = tiny(), 4000
    torch.manual_seed(7)
    first = write_on(model, [PROMPTS[0]] * count, [1] * count, [], END, sampled=True)
    torch.manual_seed(7)
    assert first == write_on(model, [PROMPTS[0]] * count, [1] * count, [], END, sampled=True)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1, :END].softmax(0)
    found = torch.bincount(torch.tensor([row[0] for row in first]), minlength=END) / count
    assert float((found - expected).abs().sum()) / 2 < 0.06  # total variation; about 0.04 is chance
    assert float(expected.max()) < 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_trains_can_answer_between_two_steps(checkpointing: bool) -> None:
    expected = write_on(tiny(), PROMPTS, [6] * 4, [], END)
    model = tiny().train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert write_on(model, PROMPTS, [6] * 4, [], END) == expected
