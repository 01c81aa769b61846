"""The teacher's cache: small, exact, in the rows' order."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, trained_positions
from edgeft.tune.losses import answer_logits
from edgeft.tune.targets import (
    RowTargets,
    gather,
    load_shard,
    save_shard,
    student_ids,
    teacher_targets,
    top_k,
    translate,
)

CPU = torch.device("cpu")


def rows() -> list[Encoded]:
    """Rows of different lengths with a common start, not in order of length."""
    made = []
    for n in (9, 5, 12, 7):
        ids = (1, 2, *range(10, 10 + n))
        made.append(Encoded(ids, tuple(i >= 5 for i in range(len(ids)))))
    return made


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_targets_belong_to_their_rows_whatever_the_batches(temperature: float) -> None:
    model = tiny()
    for row, kept in zip(rows(), teacher_targets(model, rows(), 4, temperature, 0, CPU), strict=True):
        with torch.no_grad():
            alone = (answer_logits(model, collate([row], 0)) / temperature).log_softmax(1)
        expected, ids = alone.topk(4)
        assert len(kept.tail_N) == len(trained_positions(row))
        assert torch.equal(kept.ids_NK.long(), ids)
        torch.testing.assert_close(kept.logp_NK.float(), expected, atol=5e-3, rtol=0)
        torch.testing.assert_close(kept.tail_N, 1 - expected.exp().sum(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("vocabulary", [40, 2000, 2011])
def test_the_kept_tokens_are_the_most_probable_of_any_vocabulary(vocabulary: int) -> None:
    logits = 3 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[3, 20:26] = 30.0 + torch.arange(6)  # many of them in one block
    kept = top_k(logits, 8)
    expected, ids = logits.log_softmax(1).topk(8)
    assert torch.equal(kept.ids_NK.long(), ids)
    torch.testing.assert_close(kept.logp_NK.float(), expected, atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(kept.tail_N, 1 - expected.exp().sum(1), atol=1e-5, rtol=1e-3)


def test_a_shard_comes_back_as_it_was_and_costs_at_most_150_bytes_per_token(tmp_path: Path) -> None:
    kept = teacher_targets(tiny(), rows(), 16, 1.0, 0, CPU)
    save_shard(tmp_path / "shard.safetensors", kept)
    back = load_shard(tmp_path / "shard.safetensors")
    for a, b in zip(kept, back, strict=True):
        assert torch.equal(a.ids_NK, b.ids_NK) and torch.equal(a.logp_NK, b.logp_NK) and torch.equal(a.tail_N, b.tail_N)
    tokens = sum(len(row.tail_N) for row in kept)
    payload = sum(t.numel() * t.element_size() for row in kept for t in (row.ids_NK, row.logp_NK, row.tail_N))
    assert payload / tokens <= 150
    assert [p.name for p in tmp_path.iterdir()] == ["shard.safetensors"]


def test_gathered_targets_stand_one_row_after_the_other() -> None:
    kept = teacher_targets(tiny(), rows(), 4, 1.0, 0, CPU)
    ids_NK, logp_NK, tail_N = gather([kept[2], kept[0]])
    assert len(ids_NK) == len(logp_NK) == len(tail_N) == len(kept[2].tail_N) + len(kept[0].tail_N)
    assert torch.equal(ids_NK[: len(kept[2].tail_N)], kept[2].ids_NK.long())


def test_what_the_teacher_gave_to_tokens_that_the_student_lacks_is_shared_out_over_the_others() -> None:
    teacher_p = torch.tensor([[0.4, 0.3, 0.1, 0.2], [0.7, 0.1, 0.1, 0.1]])  # two kept tokens, two in the tail
    row = RowTargets(torch.tensor([[5, 6], [6, 5]]).int(), teacher_p[:, :2].log().half(), teacher_p[:, 2:].sum(1))
    ours = translate(row, student_ids([0, 3, 5, 7], teacher_vocab_size=8))  # 6 is not among the student's tokens
    places = (ours.ids_NK == 2).nonzero()
    assert places.tolist() == [[0, 0], [1, 1]]  # the teacher's 5
    torch.testing.assert_close(ours.logp_NK.exp()[0, 0], torch.tensor(0.4 / 0.7), atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.tail_N, torch.tensor([0.3 / 0.7, 0.2 / 0.3]), atol=1e-3, rtol=0)
    assert ours.logp_NK.isinf().tolist() == [[False, True], [True, False]]
    assert (ours.ids_NK[:, 0] != ours.ids_NK[:, 1]).all()  # a free place names another token


def test_a_teacher_sure_of_a_token_that_the_student_lacks_leaves_finite_targets() -> None:
    row = RowTargets(torch.tensor([[6, 5]]).int(), torch.tensor([[0.0, -30.0]]).half(), torch.tensor([0.0]))
    ours = translate(row, student_ids([0, 3, 5, 7], teacher_vocab_size=8))
    assert ours.logp_NK[0, 1].isfinite()
    assert float(ours.tail_N[0]) == 0.0
