import pytest
import torch

import ops
from ops.reference.codebook_stats import codebook_stats as reference
from ops.triton import codebook_stats as kernels
from tests.kernels.harness import DTYPES, randn


def check(device, dtype, num_rows=200, num_codes=70, width=20):
    x = randn(num_rows, width).to(dtype)
    codes = torch.randint(num_codes, (num_rows,), generator=torch.Generator().manual_seed(1))
    codes[codes == 3] = 0  # a code without rows
    counts, sums = ops.codebook_stats(x.to(device), codes.to(device), num_codes)
    expected_counts, expected_sums = reference(x.double(), codes, num_codes)
    assert counts.dtype == torch.int64
    assert sums.dtype == torch.float32
    assert torch.equal(counts.cpu(), expected_counts)
    torch.testing.assert_close(sums.cpu().double(), expected_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_odd_numbers_of_rows(device, num_rows):
    check(device, torch.float32, num_rows=num_rows)


@pytest.mark.parametrize(("num_codes", "width"), [(1, 1), (64, 16), (65, 130), (256, 3)])
def test_numbers_of_codes_and_widths(device, num_codes, width):
    check(device, torch.float32, num_codes=num_codes, width=width)


def test_strips_of_several_blocks(device, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    check(device, torch.float32, num_rows=300)


def test_same_bits_again(device):
    x, codes = randn(500, 8).to(device), torch.arange(500, device=device) % 7
    first, again = ops.codebook_stats(x, codes, 7), ops.codebook_stats(x, codes, 7)
    assert torch.equal(first[1], again[1])


def test_half_precision_accumulates_in_fp32(device):
    x = torch.ones(5000, 1, dtype=torch.bfloat16, device=device)
    counts, sums = ops.codebook_stats(x, torch.zeros(5000, dtype=torch.int64, device=device), 1)
    assert counts.tolist() == [5000]
    assert sums.tolist() == [[5000.0]]


def test_the_kernel_ignores_codes_out_of_range(device):
    x, codes = torch.ones(5, 2, device=device), torch.tensor([-1, 0, 3, 1 << 40, 2], device=device)
    counts, sums = kernels.codebook_stats(x, codes, 3)
    assert counts.tolist() == [1, 0, 1]
    assert sums[:, 0].tolist() == [1.0, 0.0, 1.0]


def test_compilers_see_through(device):
    x, codes = randn(40, 4).to(device).T.contiguous().T, torch.arange(40, device=device) % 9
    torch.library.opcheck(kernels.FORWARD, (x.contiguous(), codes, 9))
    compiled = torch.compile(ops.codebook_stats, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, codes, 9), ops.codebook_stats(x, codes, 9), strict=True):
        assert torch.equal(got, expected)
