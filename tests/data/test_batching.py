import numpy as np
import pytest
import torch

import data.batching
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


def fields_of(batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("item_ids", "offsets", "user_hashes", "targets")}


def many_histories(num_users: int = 60) -> tuple[Histories, Ranges]:
    lengths = torch.randint(2, 40, (num_users,), generator=torch.Generator().manual_seed(1))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    num_items = int(offsets[-1])
    histories = Histories(
        offsets, torch.arange(num_items, dtype=torch.int32), torch.arange(num_items), torch.arange(num_users) * 7
    )
    rows = torch.arange(num_users, dtype=torch.int32)
    return histories, Ranges(rows, torch.zeros_like(rows), (lengths - 1).int())


@pytest.mark.parametrize("strategy", list(ExampleStrategy))
def test_batches_of_fixed_capacity_are_the_plain_ones_with_a_tail(strategy):
    histories, ranges = many_histories()
    settings = {"strategy": strategy, "max_history": 12, "batch_size": 24, "seed": 3}
    plain = TrainingBatches(histories, ranges, **settings)
    fixed = TrainingBatches(histories, ranges, **settings, fixed_capacity=True)
    sizes = set()
    for step in range(40):
        expected, got = plain.batch(step), fixed.batch(step)
        num_items = len(got.item_ids)
        assert 0 <= num_items - len(expected.item_ids) < 128
        expected = expected.to_capacity(num_rows=24, num_items=num_items)
        torch.testing.assert_close(fields_of(got), fields_of(expected), rtol=0, atol=0)
        assert got.max_len == 12
        sizes.add(num_items)
    assert len(sizes) <= 4
    assert all(size % 128 == 0 for size in sizes)


def test_capacities_grow_with_the_batch_so_that_there_are_few():
    histories, ranges = many_histories(500)
    stream = TrainingBatches(
        histories,
        ranges,
        strategy=ExampleStrategy.EVERY_PREFIX,
        max_history=40,
        batch_size=1024,
        seed=0,
        fixed_capacity=True,
    )
    examples = [stream.draw(step) for step in range(50)]
    used = sum(int((batch.places[2] - batch.places[1]).sum()) for batch in examples)
    assert sum(batch.num_items for batch in examples) < 1.1 * used
    assert len({batch.num_items for batch in examples}) <= 6


def test_a_step_sends_only_the_numbers_of_its_examples(histories):
    stream = batches(histories, ExampleStrategy.LAST_ONLY, batch_size=2, max_history=1)
    drawn = stream.draw(0)
    assert drawn.places.dtype == torch.int32
    assert sorted(drawn.places.T.tolist()) == [[0, 1, 2], [2, 0, 1]]
    assert (drawn.num_items, drawn.max_len, len(drawn)) == (2, 1, 2)


@pytest.mark.parametrize("fixed_capacity", [False, True])
def test_histories_that_do_not_fit_on_the_device_are_packed_on_the_host(fixed_capacity):
    histories, ranges = many_histories()
    settings = {"strategy": ExampleStrategy.EVERY_PREFIX, "max_history": 12, "batch_size": 24, "seed": 3}
    near = TrainingBatches(histories, ranges, **settings, fixed_capacity=fixed_capacity)
    far = TrainingBatches(histories, ranges, **settings, fixed_capacity=fixed_capacity)
    far._is_near = False
    for step in range(3):
        drawn = far.draw(step)
        assert drawn.item_ids.dtype == torch.int64
        torch.testing.assert_close(fields_of(far.pack(drawn)), fields_of(near.batch(step)), rtol=0, atol=0)


def test_data_lies_on_a_gpu_if_it_takes_a_quarter_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 9000))
    gpu = torch.device("cuda")
    assert data.batching._fits(1000, gpu)
    assert not data.batching._fits(1001, gpu)
    assert not data.batching._fits(1, torch.device("cpu"))


def test_feature_rows_gathered_on_the_device_are_those_of_the_host(monkeypatch):
    features = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float16)
    host = FeatureBatches(features, batch_size=4, seed=0)
    monkeypatch.setattr(data.batching, "_fits", lambda num_bytes, device: True)
    device = FeatureBatches(features, batch_size=4, seed=0)
    for step in range(4):
        assert device.draw(step).shape == (4,)
        torch.testing.assert_close(device.batch(step), host.batch(step), rtol=0, atol=0)
        assert device.batch(step).dtype == torch.float32
