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


def test_compiles_in_one_graph():
    x, codes = torch.ones(5, 2), torch.tensor([0, 1, 1, 0, 1])
    counts, sums = torch.compile(ops.codebook_stats, fullgraph=True, backend="eager")(x, codes, 3)
    assert counts.tolist() == sums[:, 0].tolist() == [2, 3, 0]


@pytest.mark.parametrize(
    ("x", "codes", "num_codes", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 0, 0]), 4, r"x of shape \[B, D\]"),
        (torch.zeros(3, 2), torch.tensor([0, 0]), 4, r"codes \[3\] .* got x \[3, 2\] float32, codes \[2\] int64"),
        (torch.zeros(2, 2), torch.tensor([0, 0]).int(), 4, "codes as int64"),
        (torch.zeros(2, 2).long(), torch.tensor([0, 0]), 4, "floating-point x"),
        (torch.zeros(2, 2), torch.tensor([0, 4]), 4, r"codes in 0\.\.3, got 0 to 4"),
        (torch.zeros(2, 2), torch.tensor([0, -1]), 4, r"codes in 0\.\.3, got -1 to 0"),
        (torch.zeros(2, 2), torch.tensor([0, 0]), 0, "num_codes of at least 1"),
    ],
    ids=["rank", "length", "index dtype", "dtype", "too large", "negative", "no codes"],
)
def test_bad_input_is_refused(x, codes, num_codes, message):
    with pytest.raises(ValueError, match=message):
        ops.codebook_stats(x, codes, num_codes)
