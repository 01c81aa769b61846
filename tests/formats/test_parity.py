from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeft.errors import ParityError
from edgeft.formats.parity import compare, compare_answers, descent, differences, part_at, summarize
from edgeft.formats.probe import Probe


def logits(seed: int, num_positions: int = 150, scale: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, (num_positions, 40)).astype(np.float32)


def next_ids(num_positions: int = 150) -> NDArray[np.int64]:
    return np.random.default_rng(9).integers(0, 40, num_positions)


def test_the_figures_are_those_of_torch_in_float64() -> None:
    reference, model, ids = logits(0), logits(0) + logits(1, scale=0.3), next_ids()
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), 1) for x in (reference, model))
    kl = (p.exp() * (p - q)).sum(1)
    found = compare(reference, model, ids)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(torch.quantile(kl, 0.99).item(), rel=1e-5)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-5)
    assert found.top1 == (p.argmax(1) == q.argmax(1)).double().mean().item()
    taken = torch.arange(150), torch.from_numpy(ids)
    assert found.perplexity == pytest.approx((-q[taken]).mean().exp().item(), rel=1e-5)
    assert found.perplexity_reference == pytest.approx((-p[taken]).mean().exp().item(), rel=1e-5)
    assert found.n_positions == 150


def test_equal_logits_have_no_divergence() -> None:
    found = compare(logits(0), logits(0), next_ids())
    assert (found.kl_mean, found.kl_max, found.top1) == (0.0, 0.0, 1.0)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    assert compare(logits(0), logits(0) + np.float32(7), next_ids()).kl_max < 1e-6


def test_the_divergence_is_taken_from_the_reference() -> None:
    a, b, ids = logits(0), logits(1), next_ids()
    assert compare(a, b, ids).kl_mean != pytest.approx(compare(b, a, ids).kl_mean, rel=1e-3)


def test_parts_give_the_same_figures_as_the_whole() -> None:
    reference, model, ids = logits(0), logits(1), next_ids()
    cuts = [(0, 7), (7, 7), (7, 150)]
    parts = [differences(reference[a:b], model[a:b], ids[a:b]) for a, b in cuts]
    assert summarize(parts) == compare(reference, model, ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    model = logits(1)
    model[100, 3] = bad
    with pytest.raises(ParityError, match="not finite"):
        compare(logits(0), model, next_ids())


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(ParityError, match=r"\(150, 39\).*\(150, 40\)"):
        compare(logits(0), logits(1)[:, :39], next_ids())


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ParityError, match="no position"):
        compare(logits(0)[:0], logits(1)[:0], next_ids()[:0])


def test_answers_part_at_the_first_other_token_or_where_one_ends() -> None:
    assert part_at([1, 2, 3], [1, 2, 3]) is None
    assert part_at([1, 2, 3], [1, 9, 3]) == 1
    assert part_at([1, 2], [1, 2, 3]) == 2


def test_equal_answers_are_counted_and_the_others_give_the_median() -> None:
    found = compare_answers([[1, 2], [3], [4, 5, 6], [7, 8]], [[1, 2], [4], [4, 5, 7], [7]])
    assert (found.rows, found.equal, found.part_at_median) == (4, 1, 1.0)
    assert compare_answers([[1]], [[1]]).part_at_median is None


def test_a_child_with_fewer_tokens_is_compared_over_its_own() -> None:
    rows, positions = [[0, 1, 2], [2, 1, 0]], [[0, 1], [0, 1]]
    child = Probe(rows, positions, logits(0, 4)[:, :3])
    wide = logits(1, 4)
    wide[:, [7, 3, 5]] = child.logits_PV  # the parent calls the tokens 7, 3, 5, and gives the same odds among them
    wide[2:] *= -1
    parent = Probe([[7, 3, 5], [5, 3, 9]], positions, wide)  # and cuts the second row otherwise
    by_row = descent(parent, child, [7, 3, 5])
    found = summarize(list(by_row.values()))
    assert list(by_row) == [0] and found.n_positions == 2 and found.kl_max < 1e-6
    assert descent(Probe([[1, 3]], [[0]], wide[:1]), child, [7, 3, 5]) == {}
