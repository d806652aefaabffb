import threading
from typing import ClassVar

import numpy as np
import pytest
import torch

import data.batching
import data.mapped_rows
from data.batching import (
    ExampleStrategy,
    FeatureBatches,
    ShuffledEpochs,
    TrainingBatches,
    cold_items,
    evaluation_batches,
    held_out_rows,
)
from data.joined_rows import JoinedRows
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


@pytest.fixture
def mapped(tmp_path) -> np.ndarray:
    """Memory map [23, 3] float16 of distinct numbers."""
    np.save(tmp_path / "features.npy", np.arange(69, dtype=np.float16).reshape(23, 3))
    return np.load(tmp_path / "features.npy", mmap_mode="r")


def numbers_of(stream: FeatureBatches, steps: range) -> list[list[int]]:
    """Row numbers of batches of `mapped`."""
    return [(stream.batch(step)[:, 0] / 3).int().tolist() for step in steps]


@pytest.mark.parametrize("rows", [None, np.array([20, 3, 4, 9, 11])], ids=["all", "some"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_reading_ahead_changes_no_batch(mapped, rows, depth):
    in_memory = FeatureBatches(np.array(mapped), batch_size=4, seed=1, rows=rows)
    plain = FeatureBatches(mapped, batch_size=4, seed=1, rows=rows, prefetch=0)
    ahead = FeatureBatches(mapped, batch_size=4, seed=1, rows=rows, prefetch=depth)
    for step in range(12):
        expected = in_memory.batch(step)
        assert expected.dtype == torch.float32
        torch.testing.assert_close(plain.batch(step), expected, rtol=0, atol=0)
        torch.testing.assert_close(ahead.batch(step), expected, rtol=0, atol=0)


def test_batches_of_features_are_the_rows_that_the_order_names(mapped):
    order = ShuffledEpochs(23, 4, 1)
    expected = [np.concatenate([chosen for _, chosen in order.examples(step)]).tolist() for step in range(12)]
    assert numbers_of(FeatureBatches(mapped, batch_size=4, seed=1), range(12)) == expected


@pytest.mark.parametrize("first", [0, 1, 5, 6, 11])
def test_feature_batches_go_on_at_any_step(mapped, first):
    whole = numbers_of(FeatureBatches(mapped, batch_size=4, seed=1), range(14))
    assert numbers_of(FeatureBatches(mapped, batch_size=4, seed=1), range(first, 14)) == whole[first:]


def test_chosen_rows_are_visited_once_an_epoch_and_no_other(mapped):
    rows = np.array([20, 3, 4, 9, 11, 0])
    batches = numbers_of(FeatureBatches(mapped, batch_size=2, seed=0, rows=rows), range(9))
    for epoch in range(3):
        seen = [number for batch in batches[3 * epoch : 3 * epoch + 3] for number in batch]
        assert sorted(seen) == sorted(rows.tolist())
    assert batches[:3] != batches[3:6]


def test_processes_share_the_rows_of_a_step(mapped):
    rows = np.arange(5, 21)
    whole = numbers_of(FeatureBatches(mapped, batch_size=8, seed=0, rows=rows), range(4))
    streams = [
        FeatureBatches(mapped, batch_size=4, seed=0, rows=rows, process_index=index, num_processes=2)
        for index in range(2)
    ]
    first, second = (numbers_of(stream, range(4)) for stream in streams)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    for a, b in zip(first, second, strict=True):
        assert not set(a) & set(b)  # 16 rows are two whole steps: no step crosses an epoch


def test_a_memory_map_is_read_step_by_step_and_not_copied(tmp_path):
    np.save(tmp_path / "features.npy", np.zeros((8, 2), dtype=np.float32))
    writable = np.load(tmp_path / "features.npy", mmap_mode="r+")
    plain = FeatureBatches(writable, batch_size=8, seed=0, prefetch=0)
    ahead = FeatureBatches(writable, batch_size=8, seed=0)
    assert plain.batch(0).eq(0).all()
    writable[:] = 7
    assert plain.batch(1).eq(7).all()
    assert ahead.batch(1).eq(7).all()


def test_rows_of_a_file_are_read_in_their_order():
    class Noted(np.ndarray):
        asked: ClassVar[list[list[int]]] = []

        def __getitem__(self, rows):
            self.asked.append(np.asarray(rows).tolist())
            return np.asarray(self)[rows]

    features = np.arange(46, dtype=np.float32).reshape(23, 2)
    batch = FeatureBatches(features.view(Noted), batch_size=9, seed=0).batch(0)
    (asked,) = Noted.asked
    assert asked == sorted(asked)
    assert batch[:, 0].tolist() != batch[:, 0].sort().values.tolist()
    assert (batch[:, 0] / 2).sort().values.tolist() == asked


def threads_that_read() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")}


def test_only_memory_maps_are_read_ahead_and_the_thread_ends_with_the_batches(mapped, monkeypatch):
    before = threads_that_read()
    FeatureBatches(np.array(mapped), batch_size=2, seed=0).batch(0)
    FeatureBatches(mapped, batch_size=2, seed=0, prefetch=0).batch(0)
    with monkeypatch.context() as patch:
        patch.setattr(data.batching, "_fits", lambda num_bytes, device: True)
        FeatureBatches(mapped, batch_size=2, seed=0).batch(0)
    assert threads_that_read() <= before
    stream = FeatureBatches(mapped, batch_size=2, seed=0)
    stream.batch(0)
    (thread,) = threads_that_read() - before
    del stream
    thread.join(20)
    assert not thread.is_alive()


def test_an_error_of_reading_reaches_the_step(mapped, monkeypatch):
    stream = FeatureBatches(mapped, batch_size=2, seed=0)
    stream.batch(0)
    monkeypatch.setattr(ShuffledEpochs, "examples", lambda self, step: [(0, np.array([99]))])
    with pytest.raises(IndexError, match="99 is out of bounds"):
        stream.batch(50)


def test_several_data_sets_are_batched_as_one(mapped):
    joined = JoinedRows([mapped[:10], np.array(mapped[10:])])
    expected = numbers_of(FeatureBatches(mapped, batch_size=4, seed=3), range(8))
    assert numbers_of(FeatureBatches(joined, batch_size=4, seed=3), range(8)) == expected


def test_features_for_a_device_are_copied_in_blocks(mapped, monkeypatch):
    monkeypatch.setattr(data.batching, "_fits", lambda num_bytes, device: True)
    monkeypatch.setattr(data.batching, "_COPIED_ROWS", 5)
    rows = np.array([22, 0, 7])
    stream = FeatureBatches(mapped, batch_size=3, seed=0, rows=rows)
    assert sorted(stream.draw(0).tolist()) == [0, 7, 22]
    assert numbers_of(stream, range(1)) == [stream.draw(0).tolist()]
    assert stream._resident.dtype == torch.float16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 23]), "numbers from 0 to 22, got 23"),
        (np.array([-1, 2]), "numbers from 0 to 22, got -1"),
        (np.array([], dtype=np.int64), r"at least one row number, got int64 of shape \[0\]"),
        (np.ones(23, dtype=bool), "at least one row number, got bool"),
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_refused(mapped, rows, message):
    with pytest.raises(InputError, match=message):
        FeatureBatches(mapped, batch_size=2, seed=0, rows=rows)


def test_features_without_rows_and_a_negative_depth_are_refused(mapped):
    with pytest.raises(InputError, match="the features have no rows"):
        FeatureBatches(mapped[:0], batch_size=2, seed=0)
    with pytest.raises(InputError, match="prefetch must be at least 0, got -1"):
        FeatureBatches(mapped, batch_size=2, seed=0, prefetch=-1)


def test_held_out_rows_are_a_share_in_order_and_the_same_for_a_seed():
    held = held_out_rows(1000, 0.1, 3)
    assert len(held) == len(set(held.tolist())) == 100
    assert (np.diff(held) > 0).all()
    assert 0 <= held[0] < held[-1] < 1000
    np.testing.assert_array_equal(held_out_rows(1000, 0.1, 3), held)
    assert held_out_rows(1000, 0.1, 4).tolist() != held.tolist()
    assert held_out_rows(1000, 0.0, 3).tolist() == []
    assert len(held_out_rows(1000, 1e-6, 3)) == 1


def test_held_out_rows_are_independent_of_the_order_of_epochs():
    held = set(held_out_rows(1000, 0.1, 3).tolist())
    for epoch in range(4):
        first = np.random.default_rng([3, epoch, 0]).permutation(1000)[:100].tolist()
        assert len(held & set(first)) < 25  # ten are expected


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match=r"must lie in \[0, 1\), got"):
        held_out_rows(10, share, 0)


def test_holding_out_every_row_is_refused():
    with pytest.raises(InputError, match="holding out 1 of 1 rows leaves none"):
        held_out_rows(1, 0.1, 0)


def test_batches_are_the_same_from_files_beyond_memory(mapped, monkeypatch):
    expected = numbers_of(FeatureBatches(mapped, batch_size=4, seed=3), range(8))
    asked = []
    monkeypatch.setattr(data.mapped_rows, "_memory_bytes", lambda: 100)
    monkeypatch.setattr(data.mapped_rows, "_ask_for", lambda matrix, rows: asked.append(rows.tolist()))
    assert numbers_of(FeatureBatches(mapped, batch_size=4, seed=3, prefetch=0), range(8)) == expected
    assert asked == [sorted(batch) for batch in expected]
