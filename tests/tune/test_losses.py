"""The loss against dense formulas in float64, and rows against their neighbours."""

from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, shared_tokens
from edgeft.tune.kernels import ROWS_ATTENTION
from edgeft.tune.losses import HEAD_ROWS, Distance, TeacherTopK, answer_logits, answer_loss, batch_loss
from edgeft.tune.targets import top_k

N, V, K = 70, 50, 8  # more rows than one chunk


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(student: torch.Tensor, teacher: TeacherTopK, distance: Distance = Distance()) -> torch.Tensor:  # noqa: B008
    """The same divergence by autograd, in the words of its definition: kept tokens and one bucket for the rest."""
    q_kept = (student / distance.temperature).softmax(1).gather(1, teacher.ids_NK)
    p = torch.cat([teacher.logp_NK.exp(), teacher.tail_N[:, None]], 1)
    q = torch.cat([q_kept, 1 - q_kept.sum(1, keepdim=True)], 1)

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum()

    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "js": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "skewed_kl": lambda: kl(p, distance.skew * p + (1 - distance.skew) * q),
    }[distance.kind]()
    return value * distance.temperature**2


DISTANCES = [Distance(kind, temperature=t) for kind in get_args(get_type_hints(Distance)["kind"]) for t in (1.0, 2.5)]


def exact_targets(teacher_logits: torch.Tensor) -> TeacherTopK:
    log_p = teacher_logits.log_softmax(1)
    kept, ids = log_p.topk(K)
    return TeacherTopK(ids, kept, 1 - kept.exp().sum(1))


def test_the_cross_entropy_and_its_gradient_equal_torch() -> None:
    student, labels = logits(0).requires_grad_(), torch.arange(N) % V
    ours = answer_loss(student, labels)
    (gradient,) = torch.autograd.grad(ours, student)
    reference = F.cross_entropy(student, labels, reduction="sum")
    (expected,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_the_mixed_loss_and_its_gradient_equal_the_dense_formula(distance: Distance) -> None:
    student, labels, teacher = logits(1).requires_grad_(), torch.arange(N) % V, exact_targets(logits(2))
    ours = answer_loss(student, labels, teacher, 0.3, distance)
    (gradient,) = torch.autograd.grad(ours, student)
    reference = 0.3 * dense(student, teacher, distance) + 0.7 * F.cross_entropy(student, labels, reduction="sum")
    (expected,) = torch.autograd.grad(reference, student)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_a_kept_token_of_probability_zero_only_fills_its_place(distance: Distance) -> None:
    student, labels, teacher = logits(1).requires_grad_(), torch.arange(N) % V, exact_targets(logits(2))
    tail = teacher.tail_N + teacher.logp_NK[:, :2].exp().sum(1)  # of the two likeliest too, which are left out
    fewer = TeacherTopK(teacher.ids_NK[:, 2:], teacher.logp_NK[:, 2:], tail)
    empty = TeacherTopK(teacher.ids_NK, teacher.logp_NK.clone(), tail)
    empty.logp_NK[:, :2] = -torch.inf
    found = []
    for targets in (fewer, empty):
        loss = answer_loss(student, labels, targets, 0.3, distance)
        found.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "skewed_kl"])
def test_a_student_equal_to_its_teacher_is_at_no_distance_and_stays(kind: Any) -> None:
    student = logits(3).requires_grad_()
    teacher = exact_targets(student.detach())
    loss = answer_loss(student, torch.zeros(N, dtype=torch.long), teacher, 1.0, Distance(kind))
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(float(loss.detach())) < 1e-9
    assert float(gradient.abs().max()) < 1e-9


def test_the_truncated_kl_never_exceeds_the_full_one() -> None:
    student, teacher = logits(4), logits(5)
    full = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="sum")
    ours = answer_loss(student, torch.zeros(N, dtype=torch.long), exact_targets(teacher), weight=1.0)
    assert 0 < float(ours) <= float(full)


def test_targets_keep_the_probability_mass() -> None:
    kept = top_k(logits(6).float(), K)
    torch.testing.assert_close(kept.logp_NK.float().exp().sum(1) + kept.tail_N, torch.ones(N), atol=2e-3, rtol=0)


def tiny(attention: str = "eager") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def row(*own: int, trained: int = 2) -> Encoded:
    ids = (1, 2, 3, *own)
    return Encoded(ids, tuple(i >= len(ids) - trained for i in range(len(ids))))


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("end_id", [None, 60])
def test_the_loss_without_all_logits_in_memory_is_the_same(taught: bool, frozen: bool, end_id: int | None) -> None:
    rows = [row(*range(4, 60), trained=55) for _ in range(5)]
    assert 2 * HEAD_ROWS < 5 * 55, "more than two parts"
    batch, gradients, losses = collate(rows, 0, prefix=3), [], []
    teacher = exact_targets(3 * torch.randn(5 * 55, V, generator=torch.Generator().manual_seed(0))) if taught else None
    for apart in (False, True):
        model = tiny(ROWS_ATTENTION).train()
        model.lm_head.weight.requires_grad_(not frozen)
        if apart:
            loss = batch_loss(model, batch, teacher, 0.3, end_id=end_id)
        else:
            loss = answer_loss(answer_logits(model, batch)[:, :end_id], batch.labels_N, teacher, 0.3)
        (loss * 0.5).backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    assert ("lm_head.weight" in gradients[0]) != frozen and list(gradients[0]) == list(gradients[1])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


@pytest.mark.parametrize("attention", ["eager", ROWS_ATTENTION])
def test_a_rows_logits_do_not_depend_on_its_neighbours_or_on_the_shared_prefix(attention: str) -> None:
    model, rows = tiny(attention), [row(5, 6, 7, 8), row(9, 10, 11, 12, 13, 14), row(15, 16, 17)]
    assert shared_tokens(rows) == 3
    alone = torch.cat([answer_logits(tiny(), collate([r], 0)) for r in rows])
    together = answer_logits(model, collate(rows, 0))
    shared = answer_logits(model, collate(rows, 0, prefix=3))
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(shared, alone)


@pytest.mark.parametrize("attention", ["eager", ROWS_ATTENTION])
def test_gradients_flow_through_the_shared_prefix(attention: str) -> None:
    rows = [row(5, 6, 7, 8), row(9, 10, 11, 12, 13, 14)]
    gradients = []
    for prefix, kind in ((0, "eager"), (3, attention)):
        model = tiny(kind)
        batch = collate(rows, 0, prefix)
        answer_loss(answer_logits(model, batch), batch.labels_N).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_layers_that_are_computed_twice_give_the_same_gradients() -> None:
    rows, gradients = [row(5, 6, 7, 8), row(9, 10, 11, 12, 13, 14)], []
    for twice in (False, True):
        model = tiny(ROWS_ATTENTION).train()
        if twice:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        batch = collate(rows, 0, prefix=3)
        answer_loss(answer_logits(model, batch), batch.labels_N).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_the_prefix_stops_before_the_first_position_that_is_learnt() -> None:
    assert shared_tokens([row(5, trained=1), row(5, trained=1)]) == 2
