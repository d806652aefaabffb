import numpy as np
import pytest
import torch

from data.schemas import InputError
from modules.feature_rows import RowBlocks


def rows_of(num_rows, width=3, dtype=np.float32):
    return np.arange(num_rows * width, dtype=dtype).reshape(num_rows, width)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_blocks_are_the_rows_in_order_as_fp32(dtype):
    features = rows_of(7, dtype=dtype)
    blocks = list(RowBlocks(features, block_rows=3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(blocks), torch.from_numpy(rows_of(7)), rtol=0, atol=0)


def test_a_tensor_is_read_as_an_array_is():
    features = torch.from_numpy(rows_of(5)).half()
    assert torch.cat(list(RowBlocks(features, block_rows=2))).equal(torch.from_numpy(rows_of(5)))


def test_a_memory_map_is_read_block_by_block(tmp_path):
    np.save(tmp_path / "features.npy", rows_of(10).astype(np.float16))
    features = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert torch.cat(list(RowBlocks(features, block_rows=4))).equal(torch.from_numpy(rows_of(10)))


def test_a_shuffled_epoch_holds_every_row_once_and_follows_the_seed():
    rows = RowBlocks(rows_of(50), block_rows=4)
    first, again, other = (torch.cat(list(rows.shuffled(seed))) for seed in ([0, 1], [0, 1], [0, 2]))
    assert first.equal(again)
    assert not first.equal(other)
    assert not first.equal(torch.from_numpy(rows_of(50)))
    assert first[first[:, 0].argsort()].equal(torch.from_numpy(rows_of(50)))


@pytest.mark.parametrize("block_rows", [1, 7, 100])
def test_a_sample_holds_distinct_rows_whatever_the_blocks(block_rows):
    sample = RowBlocks(rows_of(60), block_rows=block_rows).sample(20, seed=5)
    assert sample.equal(RowBlocks(rows_of(60), block_rows=60).sample(20, seed=5))
    assert len(sample[:, 0].unique()) == 20
    assert sample[:, 0].equal(sample[:, 0].sort().values)


def test_a_sample_of_all_rows_is_all_rows():
    assert RowBlocks(rows_of(9), block_rows=2).sample(9, seed=0).equal(torch.from_numpy(rows_of(9)))
    assert RowBlocks(rows_of(9), block_rows=2).sample(100, seed=0).equal(torch.from_numpy(rows_of(9)))


def test_functions_apply_one_after_the_other():
    rows = RowBlocks(rows_of(4), block_rows=3, transform=lambda rows: rows + 1).through(lambda rows: rows * 2)
    expected = (torch.from_numpy(rows_of(4)) + 1) * 2
    assert torch.cat(list(rows)).equal(expected)
    assert rows.sample(10, seed=0).equal(expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("read", [list, lambda rows: rows.sample(1, seed=0), lambda rows: list(rows.shuffled(0))])
def test_a_broken_row_is_named(value, read):
    features = rows_of(10)
    features[6, 1] = value
    with pytest.raises(InputError, match=r"NaN or infinity in row 6 \(item 'g'\)"):
        read(RowBlocks(features, block_rows=4, item_keys="abcdefghij"))
    with pytest.raises(InputError, match=r"NaN or infinity in row 6\. Rebuild"):
        read(RowBlocks(features, block_rows=4))


def test_large_values_whose_sum_is_not_finite_are_no_broken_rows():
    features = np.full((3, 2), 3e38, dtype=np.float32)
    assert torch.cat(list(RowBlocks(features, block_rows=3))).equal(torch.from_numpy(features))


@pytest.mark.parametrize("features", [np.zeros((0, 3)), np.zeros(4)])
def test_refuses_what_is_no_matrix_of_rows(features):
    with pytest.raises(InputError, match=r"expected a non-empty \[N, D\] matrix, got shape \["):
        RowBlocks(features, block_rows=4)


def test_refuses_blocks_without_rows():
    with pytest.raises(InputError, match="block_rows expected at least 1, got 0"):
        RowBlocks(rows_of(3), block_rows=0)
