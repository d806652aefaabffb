import math

import pytest
import torch

import ops

OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)


def test_every_row_and_column_for_itself() -> None:
    x = torch.tensor([[0.0, 5.0], [math.log(3.0), 5.0], [9.0, -9.0], [9.0, 9.0]])
    softmax = ops.jagged_softmax(x, OFFSETS, max_len=2)
    torch.testing.assert_close(softmax, torch.tensor([[0.25, 0.5], [0.75, 0.5], [1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(ops.jagged_softmax(x[:, 0], OFFSETS, max_len=2), softmax[:, 0])


def test_gradients_by_hand_and_by_gradcheck() -> None:
    x = torch.tensor([0.0, math.log(3.0), 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    ops.jagged_softmax(x, OFFSETS, max_len=2)[1].backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.1875, 0.1875, 0.0, 0.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: ops.jagged_softmax(x, OFFSETS, max_len=4), x)


def test_half_precision_computes_in_fp32() -> None:
    x = torch.zeros(3000, dtype=torch.bfloat16)
    softmax = ops.jagged_softmax(x, torch.tensor([0, 3000], dtype=torch.int32), max_len=3000)
    torch.testing.assert_close(softmax, torch.full_like(x, 1 / 3000))


def test_no_rows() -> None:
    x = torch.ones(3, requires_grad=True)
    softmax = ops.jagged_softmax(x, OFFSETS[:1], max_len=0)
    assert softmax.tolist() == [0.0, 0.0, 0.0]
    softmax.sum().backward()


def test_wrong_input_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"expected x of shape \[T\] or \[T, H\], .* got \[3, 1, 1\] float32"):
        ops.jagged_softmax(x[:, None, None], OFFSETS, max_len=2)
    with pytest.raises(ValueError, match=r"floating point, got \[3\] int64"):
        ops.jagged_softmax(x.long(), OFFSETS, max_len=2)
    with pytest.raises(ValueError, match=r"offsets as contiguous int32 \[B\+1\], got \[4\] int64"):
        ops.jagged_softmax(x, OFFSETS.long(), max_len=2)
    with pytest.raises(ValueError, match="got first 0, last 3, smallest step -1"):
        ops.jagged_softmax(x, torch.tensor([0, 2, 1, 3], dtype=torch.int32), max_len=2)
    with pytest.raises(ValueError, match=r"max_len at least as long as the longest row \(2\), got 1"):
        ops.jagged_softmax(x, OFFSETS, max_len=1)
    with pytest.raises(ValueError, match="tensors on one device, got x on cpu, offsets on meta"):
        ops.jagged_softmax(x, OFFSETS.to("meta"), max_len=2)
