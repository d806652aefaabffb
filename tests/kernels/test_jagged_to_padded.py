import pytest
import torch

import ops
from ops.reference import jagged_to_padded as reference
from ops.triton import jagged_to_padded as twin
from tests.kernels.harness import DTYPES, compare, offsets_of, randn

LENGTHS = (3, 0, 1, 65, 0)
EVERY_DTYPE = (*DTYPES, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


def check(device, dtype, lengths=LENGTHS, width=(5, 2), tail=7):
    """Outputs and gradients of both directions."""
    offsets, num_tokens, max_len = offsets_of(lengths), sum(lengths) + tail, max(lengths, default=0) + 1
    here = offsets.to(device)
    compare(
        lambda x: ops.jagged_to_padded(x, here, max_len=max_len, pad=-1.5),
        lambda x: reference.jagged_to_padded(x, offsets, max_len, -1.5),
        {"x": randn(num_tokens, *width)}, dtype=dtype, device=device, tolerance=(0.0, 0.0),
    )  # fmt: skip
    compare(
        lambda x: ops.padded_to_jagged(x, here, num_tokens=num_tokens),
        lambda x: reference.padded_to_jagged(x, offsets, num_tokens),
        {"x": randn(len(lengths), max_len, *width)}, dtype=dtype, device=device, tolerance=(0.0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("lengths", [(), (0, 0), (1, 1, 1), (130,), (64, 63)], ids=str)
@pytest.mark.parametrize("tail", [0, 9])
def test_lengths_of_rows(device, lengths, tail):
    check(device, torch.float32, lengths, (3,), tail)


@pytest.mark.parametrize("width", [(), (1,), (0,), (300,), (2, 1, 3)], ids=str)
def test_widths(device, width):
    check(device, torch.float32, (2, 0, 9), width)


def test_more_tokens_than_a_block(device):
    check(device, torch.float32, (1500, 0, 1100), ())


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_is_copied_bit_by_bit(device, dtype):
    x = (randn(12, 3) * 100).to(torch.complex64 if dtype.is_complex else torch.float64).to(dtype)
    offsets, max_len = offsets_of((3, 0, 7)), 8
    padded = ops.jagged_to_padded(x.to(device), offsets.to(device), max_len=max_len, pad=1).cpu()
    assert padded.dtype == dtype
    assert torch.equal(padded, reference.jagged_to_padded(x, offsets, max_len, 1))
    packed = ops.padded_to_jagged(padded.to(device), offsets.to(device), num_tokens=12).cpu()
    assert torch.equal(packed, torch.cat([x[:10], torch.zeros_like(x[10:])]))


def test_nan_and_infinity_pass_unchanged(device):
    x = torch.tensor([float("nan"), float("inf"), -0.0], device=device)
    padded = ops.jagged_to_padded(x, offsets_of((1, 2), device), max_len=2, pad=float("-inf"))
    torch.testing.assert_close(
        padded.cpu(), torch.tensor([[float("nan"), float("-inf")], [float("inf"), -0.0]]), equal_nan=True
    )


def test_non_contiguous_inputs_and_stride_0_gradients(device):
    offsets = offsets_of((2, 1), device)
    x = randn(4, 6).to(device)[:, ::2].requires_grad_()
    padded = ops.jagged_to_padded(x, offsets, max_len=3)
    assert torch.equal(padded[0, :2], x[:2])
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient.cpu(), torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, 3))


def test_opcheck(device):
    offsets = offsets_of(LENGTHS, device)
    torch.library.opcheck(twin.FORWARD, (randn(70, 2).to(device), offsets, 66, 0.0))
    torch.library.opcheck(twin.BACKWARD, (randn(5, 66, 2).to(device), offsets, 70))


def test_compiles_as_one_graph(device):
    offsets, x = offsets_of((3, 0, 1), device), randn(5, 2).to(device).requires_grad_()

    def there_and_back(x):
        padded = ops.jagged_to_padded(x, offsets, max_len=4)
        return ops.padded_to_jagged(padded * padded, offsets, num_tokens=5)

    got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, there_and_back(x))
    for one, other in zip(
        torch.autograd.grad(got.sum(), x), torch.autograd.grad(there_and_back(x).sum(), x), strict=True
    ):
        torch.testing.assert_close(one, other)
