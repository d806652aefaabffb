import pytest
import torch

import ops
from ops.reference.residual_quantize import residual_quantize as reference
from ops.triton import residual_quantize as kernels
from tests.kernels.harness import DTYPES, randn
from tests.kernels.recompiles import num_graphs

GAP = 2e-5
"""Of two distances around 10 that fp32 may order either way."""


def case(num_rows, sizes, width, seed=0):
    return randn(num_rows, width, seed=seed), [
        randn(size, width, seed=seed + 1 + level) for level, size in enumerate(sizes)
    ]


def check(device, dtype, num_rows=37, sizes=(40, 7, 300), width=20, precision="ieee"):
    """Every code is the nearest in double precision, but for near-ties; the residual is what its codes leave."""
    x, codebooks = case(num_rows, sizes, width)
    x = x.to(device, dtype)
    codebooks = [codebook.to(device) for codebook in codebooks]
    codes, residual = ops.residual_quantize(x, codebooks, precision=precision)
    assert codes.dtype == torch.int64
    assert residual.dtype == torch.float32
    left = x.double()
    for level, codebook in enumerate(codebooks):
        distance = (left[:, None] - codebook.double()[None]).square().sum(dim=-1)
        chosen = distance.gather(1, codes[:, level : level + 1])[:, 0]
        assert (chosen - distance.amin(dim=1) <= GAP).all(), f"level {level}"
        left = left - codebook.double()[codes[:, level]]
    torch.testing.assert_close(residual.double(), left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("width", [1, 16, 64, 256])
def test_widths(device, width, precision):
    check(device, torch.float32, num_rows=5, sizes=(33, 20), width=width, precision=precision)


@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_odd_numbers_of_rows(device, num_rows):
    check(device, torch.float32, num_rows=num_rows)


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 1), (256, 256, 256), (5, 4, 3, 2, 6)])
def test_levels_of_any_number_and_size(device, sizes):
    check(device, torch.float32, sizes=sizes, width=8)


def test_large_batches_take_larger_blocks(device, monkeypatch):
    monkeypatch.setattr(kernels, "_MANY_ROWS", 100)
    assert kernels._blocks(100, 32, 256)["ROWS"] == 64
    check(device, torch.float32, num_rows=130, sizes=(100, 70), width=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [20, 600])
def test_ties_go_to_the_lowest_index(device, dtype, size):
    # Whole numbers multiply and add exactly, so equal distances are equal inside a tile and across tiles.
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-2, 3, (50, 3), generator=generator).to(dtype)
    codebooks = [torch.randint(-2, 3, (size, 3), generator=generator).float() for _ in range(2)]
    assert kernels._blocks(50, 3, 600)["CODES"] < 600
    expected = reference(x, codebooks)
    got = ops.residual_quantize(x.to(device), [codebook.to(device) for codebook in codebooks])
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


def test_rows_with_nan_take_code_zero_and_leave_the_others_alone(device):
    x, codebooks = case(20, (40, 300), 6)
    expected = reference(x, codebooks)[0]
    x[3, 2] = x[19] = torch.nan
    expected[3] = expected[19] = 0
    assert torch.equal(reference(x, codebooks)[0], expected)
    codes, residual = ops.residual_quantize(x.to(device), [codebook.to(device) for codebook in codebooks])
    assert torch.equal(codes.cpu(), expected)
    assert residual.cpu().isnan().any(dim=1).nonzero()[:, 0].tolist() == [3, 19]


def test_codes_far_away_stay_in_range(device):
    x = torch.tensor([[torch.inf, 0.0], [-torch.inf, 1.0], [3e38, 3e38], [1.0, 1.0]], device=device)
    codes, _ = ops.residual_quantize(x, [randn(37, 2).to(device), randn(3, 2, seed=1).to(device)])
    assert (codes >= 0).all()
    assert (codes < torch.tensor([37, 3], device=device)).all()
    assert codes[3].tolist() == reference(torch.ones(1, 2), [randn(37, 2), randn(3, 2, seed=1)])[0][0].tolist()


def test_strided_inputs_and_half_codebooks(device):
    x, codebooks = case(20, (40, 30), 6)
    expected = reference(x, [codebook.half() for codebook in codebooks])
    turned = [codebook.half().T.contiguous().T.to(device) for codebook in codebooks]
    codes, residual = ops.residual_quantize(x.T.contiguous().T.to(device), turned)
    assert torch.equal(codes.cpu(), expected[0])
    torch.testing.assert_close(residual.cpu(), expected[1])


def test_no_gradient(device):
    x, codebooks = case(3, (4, 4), 6)
    codes, residual = ops.residual_quantize(
        x.to(device).requires_grad_(), [codebook.to(device).requires_grad_() for codebook in codebooks]
    )
    assert not residual.requires_grad
    assert not codes.requires_grad


def test_wide_rows_fall_back_and_say_so(device, caplog):
    check(device, torch.float32, num_rows=3, sizes=(5,), width=257)
    assert "wider than 256" in caplog.text


def test_double_precision_takes_the_reference(device):
    x, codebooks = case(5, (9,), 4)
    codebooks = [codebook.to(device, torch.float64) for codebook in codebooks]
    assert ops.residual_quantize(x.to(device, torch.float64), codebooks)[1].dtype == torch.float64


def test_compilers_see_through(device):
    x, codebooks = case(7, (9, 5), 4)
    x, codebooks = x.to(device), [codebook.to(device) for codebook in codebooks]
    torch.library.opcheck(kernels.FORWARD, (x, codebooks, "ieee"))
    compiled = torch.compile(ops.residual_quantize, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, codebooks), ops.residual_quantize(x, codebooks), strict=True):
        assert torch.equal(got, expected)


def test_one_graph_for_any_number_of_rows(device):
    codebook = randn(9, 4).to(device)
    inputs = ((randn(rows, 4).to(device), [codebook]) for rows in (5, 7, 11))
    assert num_graphs(ops.residual_quantize, inputs) == 1
