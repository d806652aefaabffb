import pytest
import torch

import ops
from ops.reference import jagged_reduce as reference
from ops.triton import jagged_reduce as twin
from tests.kernels.harness import DTYPES, compare, offsets_of, randn

LENGTHS = (3, 0, 1, 65, 0)


def check(device, dtype, lengths=LENGTHS, width=40, tail=7, max_len=None):
    """Outputs and gradients of sum and mean."""
    offsets, x = offsets_of(lengths), randn(sum(lengths) + tail, width)
    max_len = max(lengths, default=0) if max_len is None else max_len
    for op, exact in ((ops.jagged_sum, reference.jagged_sum), (ops.jagged_mean, reference.jagged_mean)):
        compare(
            lambda x, op=op: op(x, offsets.to(device), max_len=max_len),
            lambda x, exact=exact: exact(x, offsets, max_len),
            {"x": x}, dtype=dtype, device=device,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("lengths", [(), (0, 0), (1, 1, 1), (64, 63)], ids=str)
@pytest.mark.parametrize("tail", [0, 9])
def test_lengths_of_rows(device, lengths, tail):
    check(device, torch.float32, lengths, tail=tail)


@pytest.mark.parametrize("width", [0, 1, 300])
def test_widths(device, width):
    check(device, torch.float32, (2, 0, 9), width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_tile(device, dtype):
    check(device, dtype, (130, 2, 50), 128)


def test_a_max_len_far_above_the_rows(device):
    check(device, torch.float32, (2, 3), 3, max_len=10_000)


def test_sums_are_fp32(device):
    """In fp16 the sum would stop at 2048."""
    x = torch.ones(3000, 1, dtype=torch.float16, device=device)
    assert ops.jagged_sum(x, offsets_of((3000,), device), max_len=3000).item() == 3000


def test_opcheck(device):
    offsets = offsets_of(LENGTHS, device)
    for mean in (False, True):
        torch.library.opcheck(twin.FORWARD, (randn(70, 2).to(device), offsets, 65, mean))
        torch.library.opcheck(twin.BACKWARD, (randn(5, 2).to(device), offsets, 70, mean))


@pytest.mark.parametrize("op", [ops.jagged_sum, ops.jagged_mean])
def test_compiles_as_one_graph(device, op):
    offsets, x = offsets_of((3, 0, 1), device), randn(5, 2).to(device).requires_grad_()

    def reduced(x):
        return op(x * x, offsets, max_len=3)

    got = torch.compile(reduced, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, reduced(x))
    for one, other in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(reduced(x).sum(), x), strict=True):
        torch.testing.assert_close(one, other)
