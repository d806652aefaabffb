import numpy as np
import pytest
import torch

from data.batching import ExampleStrategy, FeatureBatches, TrainingBatches, cold_items, evaluation_batches
from data.schemas import Histories, InputError, Ranges, Split


def tensor32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def histories() -> Histories:
    # user 0: 10 11 12 13 14 | user 1: 20 21 22 | user 2: 30 31 32 33
    return Histories(
        offsets=tensor32([0, 5, 8, 12]),
        item_ids=tensor32([10, 11, 12, 13, 14, 20, 21, 22, 30, 31, 32, 33]),
        timestamps=torch.arange(12),
        user_hashes=torch.tensor([7, 8, 9]),
    )


TRAIN = Ranges(tensor32([0, 1, 2]), tensor32([0, 0, 0]), tensor32([2, 0, 1]))


def rows(batch) -> list[tuple[list[int], int]]:
    bounds = batch.offsets.tolist()
    return [
        (batch.item_ids[begin:end].tolist(), target)
        for begin, end, target in zip(bounds[:-1], bounds[1:], batch.targets.tolist(), strict=True)
    ]


def batches(histories: Histories, strategy: ExampleStrategy, **overrides) -> TrainingBatches:
    settings = {"max_history": 20, "batch_size": 1, "seed": 3} | overrides
    return TrainingBatches(histories, TRAIN, strategy=strategy, **settings)


def test_every_prefix_visits_each_target_once_an_epoch(histories):
    stream = batches(histories, ExampleStrategy.EVERY_PREFIX)
    assert stream.num_examples == 3
    for epoch in range(3):
        seen = [rows(stream.batch(epoch * 3 + step))[0] for step in range(3)]
        assert sorted(seen) == [([10], 11), ([10, 11], 12), ([30], 31)]


def test_last_only_takes_the_last_item_of_each_range(histories):
    stream = batches(histories, ExampleStrategy.LAST_ONLY, batch_size=2)
    assert sorted(rows(stream.batch(0))) == [([10, 11], 12), ([30], 31)]


def test_random_windows_stay_inside_the_range_and_change_with_the_epoch(histories):
    stream = batches(histories, ExampleStrategy.RANDOM_WINDOW, batch_size=2)
    seen = {(tuple(items), target) for step in range(40) for items, target in rows(stream.batch(step))}
    assert seen == {((10,), 11), ((10, 11), 12), ((11,), 12), ((30,), 31)}


def test_history_is_cut_to_its_last_items(histories):
    ranges = Ranges(tensor32([0, 2]), tensor32([0, 0]), tensor32([4, 3]))
    (batch,) = evaluation_batches(histories, ranges, max_history=2, batch_size=8)
    assert rows(batch) == [([12, 13], 14), ([31, 32], 33)]
    assert batch.max_len == 2
    assert batch.user_hashes.tolist() == [7, 9]
    assert batch.offsets.dtype == torch.int32


def test_a_step_is_a_pure_function_and_may_cross_epochs(histories):
    one = batches(histories, ExampleStrategy.EVERY_PREFIX, batch_size=2)
    other = batches(histories, ExampleStrategy.EVERY_PREFIX, batch_size=2)
    expected = [rows(one.batch(step)) for step in range(6)]
    assert [rows(other.batch(step)) for step in reversed(range(6))] == expected[::-1]
    assert len(expected[1]) == 2


def test_processes_share_the_global_batch_without_overlap(histories):
    whole = batches(histories, ExampleStrategy.EVERY_PREFIX, batch_size=2)
    halves = [
        batches(histories, ExampleStrategy.EVERY_PREFIX, process_index=index, num_processes=2) for index in (0, 1)
    ]
    for step in range(6):
        assert rows(whole.batch(step)) == rows(halves[0].batch(step)) + rows(halves[1].batch(step))


def test_cold_items_are_those_outside_every_training_range(histories):
    split = Split("s", train=TRAIN, valid=TRAIN, test=TRAIN)
    warm = (~cold_items(histories, split, 34)).nonzero().flatten().tolist()
    assert warm == [10, 11, 12, 20, 30, 31]


def test_ranges_without_a_target_are_refused(histories):
    lonely = Ranges(tensor32([1]), tensor32([0]), tensor32([0]))
    with pytest.raises(InputError, match="no training range holds two items"):
        TrainingBatches(histories, lonely, strategy=ExampleStrategy.LAST_ONLY, max_history=2, batch_size=1, seed=0)


def test_feature_batches_visit_every_row_once_an_epoch():
    features = np.arange(10, dtype=np.float16).reshape(5, 2)
    stream = FeatureBatches(features, batch_size=2, seed=0)
    epoch = torch.cat([stream.batch(step) for step in range(5)])
    assert epoch.dtype == torch.float32
    assert sorted(epoch[:5, 0].tolist()) == [0, 2, 4, 6, 8]
    assert sorted(epoch[5:, 0].tolist()) == [0, 2, 4, 6, 8]
