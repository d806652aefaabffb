import pytest
import torch

import ops

OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
X = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0], [100.0, 100.0]])
"""The last token is a tail."""


def test_sums_and_means_of_rows() -> None:
    assert ops.jagged_sum(X, OFFSETS, max_len=2).tolist() == [[4.0, 8.0], [0.0, 0.0], [5.0, 7.0]]
    assert ops.jagged_mean(X, OFFSETS, max_len=2).tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, 7.0]]


def test_the_gradient_of_a_mean_is_shared_by_its_row() -> None:
    x = X.clone().requires_grad_()
    (ops.jagged_mean(x, OFFSETS, max_len=2) * torch.tensor([[2.0], [7.0], [3.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0], [1.0, 1.0], [3.0, 3.0], [0.0, 0.0]]


def test_no_rows() -> None:
    x = X.clone().requires_grad_()
    total = ops.jagged_sum(x, OFFSETS[:1], max_len=0)
    assert total.shape == (0, 2)
    total.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("op", [ops.jagged_sum, ops.jagged_mean])
def test_gradcheck(op) -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(x, OFFSETS, max_len=5), x)


def test_half_precision_sums_in_fp32() -> None:
    x = torch.ones(3000, 1, dtype=torch.bfloat16)
    total = ops.jagged_sum(x, torch.tensor([0, 3000], dtype=torch.int32), max_len=3000)
    assert total.dtype == torch.bfloat16
    assert total.item() == 3008  # 3000 in bf16; a sum in bf16 would stop at 256


@pytest.mark.parametrize("op", [ops.jagged_sum, ops.jagged_mean])
def test_wrong_input_is_refused(op) -> None:
    with pytest.raises(ValueError, match=r"expected x of shape \[T, D\], got \[4\] float32"):
        op(X[:, 0], OFFSETS, max_len=2)
    with pytest.raises(ValueError, match=r"x of a floating-point dtype, got \[4, 2\] int64"):
        op(X.long(), OFFSETS, max_len=2)
    with pytest.raises(ValueError, match=r"offsets as contiguous int32 \[B\+1\], got \[4\] int64"):
        op(X, OFFSETS.long(), max_len=2)
    with pytest.raises(ValueError, match="got first 0, last 3, smallest step -1"):
        op(X, torch.tensor([0, 2, 1, 3], dtype=torch.int32), max_len=2)
    with pytest.raises(ValueError, match=r"max_len at least as long as the longest row \(2\), got 1"):
        op(X, OFFSETS, max_len=1)
    with pytest.raises(ValueError, match="tensors on one device, got x on cpu, offsets on meta"):
        op(X, OFFSETS.to("meta"), max_len=2)
