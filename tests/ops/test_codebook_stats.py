import pytest
import torch

import ops


def test_counts_and_sums_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    counts, sums = ops.codebook_stats(x, torch.tensor([2, 0, 2]), 4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]


@pytest.mark.parametrize("rows", [0, 1, 63])
def test_equals_a_product_with_one_hot_rows(rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(3, rows, generator=generator).T
    codes = torch.randint(5, (rows,), generator=generator)
    counts, sums = ops.codebook_stats(x, codes, 5)
    one_hot = torch.nn.functional.one_hot(codes, 5).float()
    assert torch.equal(counts, one_hot.sum(dim=0).long())
    torch.testing.assert_close(sums, one_hot.T @ x)


def test_half_precision_accumulates_in_fp32():
    x = torch.ones(5000, 1, dtype=torch.bfloat16)
    _, sums = ops.codebook_stats(x, torch.zeros(5000, dtype=torch.int64), 1)
    assert sums.item() == 5000.0  # in bf16 the sum stops at 256


def test_codes_of_another_length_are_refused():
    with pytest.raises(ValueError, match="codes"):
        ops.codebook_stats(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 4)
