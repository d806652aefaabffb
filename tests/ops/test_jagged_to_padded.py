import pytest
import torch

import ops

OFFSETS = torch.tensor([0, 2, 2, 3], dtype=torch.int32)


def test_by_hand() -> None:
    padded = ops.jagged_to_padded(torch.tensor([1.0, 2.0, 3.0]), OFFSETS, max_len=3, pad=-1.0)
    assert padded.tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]


@pytest.mark.parametrize("lengths", [[0], [1], [63, 0, 5]], ids=str)
def test_there_and_back(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(lengths), 2, 3, generator=torch.Generator().manual_seed(0))
    padded = ops.jagged_to_padded(x, offsets, max_len=64)
    torch.testing.assert_close(ops.padded_to_jagged(padded, offsets, num_tokens=len(x)), x)


def test_gradients_are_each_others_op() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.jagged_to_padded(x, OFFSETS, max_len=3), x)
    padded = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.padded_to_jagged(x, OFFSETS, num_tokens=3), padded)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"longest row \(2\), got 1"):
        ops.jagged_to_padded(torch.ones(3), OFFSETS, max_len=1)
    with pytest.raises(ValueError, match=r"expected x of shape \[3, max_len, ...\], got \[2, 2\]"):
        ops.padded_to_jagged(torch.ones(2, 2), OFFSETS, num_tokens=3)
