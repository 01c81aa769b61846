"""The order of the rows: every row once, the same for the same seed, long and short ones mixed."""

from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate, epoch_batches, ordered_batches

LENGTHS = [10 + (7 * i) % 50 for i in range(203)]


def test_every_row_comes_once_in_each_epoch() -> None:
    assert sorted(row for batch in epoch_batches(LENGTHS, 8, 0, 0) for row in batch) == list(range(203))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_batches(LENGTHS, 8, 0, 0)
    assert first == epoch_batches(LENGTHS, 8, 0, 0)
    assert first != epoch_batches(LENGTHS, 8, 0, 1)
    assert first != epoch_batches(LENGTHS, 8, 1, 0)


def test_long_and_short_rows_come_mixed_and_each_batch_in_order_of_length() -> None:
    batches = [[LENGTHS[i] for i in batch] for batch in epoch_batches(LENGTHS, 8, 0, 0)]
    assert all(batch == sorted(batch) for batch in batches)
    assert sum(batch[-1] - batch[0] > 20 for batch in batches) > len(batches) / 2


def test_evaluation_batches_hold_every_row_and_respect_the_budget() -> None:
    batches = list(ordered_batches(LENGTHS, 256))
    assert sorted(i for b in batches for i in b) == list(range(203))
    assert all(len(b) * max(LENGTHS[i] for i in b) <= 256 for b in batches)


def test_a_batch_points_at_the_positions_before_the_trained_tokens() -> None:
    rows = [Encoded((1, 2, 7, 8), (False, False, True, True)), Encoded((1, 2, 9), (False, False, True))]
    batch = collate(rows, pad_id=0)
    assert batch.ids_BT.tolist() == [[1, 2, 7, 8], [1, 2, 9, 0]]
    assert batch.at_N.tolist() == [1, 2, 5]
    assert batch.labels_N.tolist() == [7, 8, 9]
    assert batch.num_tokens == 7
    assert batch.lengths == [4, 3]
