import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import ops
from ops.reference.jagged_softmax import jagged_softmax as reference
from ops.triton import jagged_softmax as twin
from tests.kernels.harness import DTYPES, compare, offsets_of, randn

# In blocks wider than the tensor the interpreter computes -inf - -inf, which is never stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

LENGTHS = (3, 0, 1, 65, 0)


def check(device, dtype, lengths=LENGTHS, width=(6,), tail=7, max_len=None):
    offsets, x = offsets_of(lengths), 3 * randn(sum(lengths) + tail, *width)
    max_len = max(lengths, default=0) if max_len is None else max_len
    compare(
        lambda x: ops.jagged_softmax(x, offsets.to(device), max_len=max_len),
        lambda x: reference(x, offsets, max_len),
        {"x": x}, dtype=dtype, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [(), (6,)], ids=str)
def test_parity(device, dtype, width):
    check(device, dtype, width=width)


@pytest.mark.parametrize("lengths", [(), (0, 0), (1, 1, 1), (64, 63)], ids=str)
@pytest.mark.parametrize("tail", [0, 9])
def test_lengths_of_rows(device, lengths, tail):
    check(device, torch.float32, lengths, tail=tail)


def test_a_tail_longer_than_all_tiles(device):
    check(device, torch.float32, (2, 1), (), tail=100)


@pytest.mark.parametrize("width", [0, 1, 200])
def test_widths(device, width):
    check(device, torch.float32, (2, 0, 9), (width,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_tile(device, dtype):
    check(device, dtype, (130, 2, 50), (128,))


def test_a_max_len_far_above_the_rows(device):
    check(device, torch.float32, (2, 3), max_len=10_000)


def _million_programs(builder, axis):
    return TensorHandle(np.array([1 << 20 if axis == 0 else 1], dtype=np.int32), tl.int32)


def test_a_tail_behind_a_million_rows(device, monkeypatch):
    """Programs of 2,048 tokens: from a program's share of the tail to its next one are 2**31 tokens."""
    num_rows = 1 << 20
    if device.type == "cpu":  # too many programs to interpret: the first one is told that it has so many companions
        monkeypatch.setattr(InterpreterBuilder, "create_get_num_programs", _million_programs)
        num_rows = 1
    offsets, x = offsets_of((2, *[0] * (num_rows - 1)), device), torch.zeros(12, device=device).requires_grad_()
    softmax = ops.jagged_softmax(x, offsets, max_len=2048)
    assert softmax.tolist() == [0.5] * 2 + [0.0] * 10
    (grad,) = torch.autograd.grad(softmax[0], x)
    assert grad.tolist() == [0.25, -0.25] + [0.0] * 10


def test_large_and_infinite_scores(device):
    """A first tile of -inf alone leaves the running sum at zero, not at NaN."""
    x = torch.full((40, 128), float("-inf"))
    x[20], x[30] = 1e4, 1e4
    softmax = ops.jagged_softmax(x.to(device), offsets_of((40,), device), max_len=40).cpu()
    expected = torch.zeros(40, 128)
    expected[20] = expected[30] = 0.5
    torch.testing.assert_close(softmax, expected)


def test_opcheck(device):
    offsets, x = offsets_of(LENGTHS, device), randn(70, 2).to(device)
    torch.library.opcheck(twin.FORWARD, (x, offsets, 65))
    torch.library.opcheck(twin.BACKWARD, (x, x.exp(), offsets, 65))


def test_compiles_as_one_graph(device):
    offsets, x = offsets_of((3, 0, 1), device), randn(5, 2).to(device).requires_grad_()

    def squared(x):
        return ops.jagged_softmax(x, offsets, max_len=3).square()

    got = torch.compile(squared, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, squared(x))
    for one, other in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(squared(x).sum(), x), strict=True):
        torch.testing.assert_close(one, other)
