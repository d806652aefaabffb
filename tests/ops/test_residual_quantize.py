import pytest
import torch

import ops
from ops.cpu import residual_quantize as cpu
from ops.reference import residual_quantize as reference

FIRST = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
SECOND = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])


def brute_force(x, codebooks):
    residual, codes = x.double(), []
    for codebook in codebooks:
        distance = (residual[:, None, :] - codebook.double()[None]).square().sum(dim=-1)
        codes.append(distance.argmin(dim=1))
        residual = residual - codebook.double()[codes[-1]]
    return torch.stack(codes, dim=1), residual


def test_two_levels_by_hand():
    x = torch.tensor([[4.9, 0.2], [0.1, 4.75], [2.9, 3.1], [0.0, 0.0]])
    codes, residual = ops.residual_quantize(x, [FIRST, SECOND])
    assert codes.tolist() == [[1, 1], [2, 2], [3, 3], [0, 0]]
    torch.testing.assert_close(residual, torch.tensor([[-0.1, 0.2], [0.1, -0.25], [-0.1, 0.1], [0.0, 0.0]]))


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    codes, _ = ops.residual_quantize(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), [codebook])
    assert codes[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("rows", [0, 1, 63, 200])
@pytest.mark.parametrize("sizes", [(1,), (7, 300, 2)])
def test_equals_brute_force_in_double(rows, sizes):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(5, rows, generator=generator).T  # not contiguous
    codebooks = [torch.randn(size, 5, generator=generator) for size in sizes]
    codes, residual = ops.residual_quantize(x, codebooks)
    expected_codes, expected_residual = brute_force(x, codebooks)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected_codes.reshape(rows, len(sizes)))
    torch.testing.assert_close(residual, expected_residual.float())


@pytest.mark.parametrize("twin", [reference, cpu])
def test_blocks_of_rows_do_not_change_the_result(monkeypatch, twin):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    codebooks = [torch.randn(size, 4, generator=torch.Generator().manual_seed(1)) for size in (8, 3)]
    whole = twin.residual_quantize(x, codebooks)
    monkeypatch.setattr(twin, "_MAX_DISTANCES", 3 * 8)
    blocked = twin.residual_quantize(x, codebooks)
    assert torch.equal(whole[0], blocked[0])
    torch.testing.assert_close(whole[1], blocked[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 63, 3000])
def test_the_twin_for_processors_gives_what_the_plain_one_gives(dtype, rows):
    """On whole numbers, which do not round: ties, NaN, an odd number of codes, strides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (6, rows), generator=generator).to(dtype).T
    x[::7, 1] = float("nan")
    codebooks = [torch.randint(-4, 5, (size, 6), generator=generator).float() for size in (100, 1, 259)]
    codebooks[0].requires_grad_()
    expected = reference.residual_quantize(x, codebooks)
    found = cpu.residual_quantize(x, codebooks)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


def test_input_is_left_alone_and_has_no_gradient():
    x = torch.tensor([[3.0, 1.0]], requires_grad=True)
    before = x.detach().clone()
    _, residual = ops.residual_quantize(x, [FIRST])
    assert not residual.requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_compared_in_fp32(dtype):
    # The squared distances, 9e-6 and 4e-6, are the same number in half precision's expansion around 1.
    x = torch.tensor([[1.0]], dtype=dtype)
    codebook = torch.tensor([[1.003], [1.002]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, residual = ops.residual_quantize(x, [codebook])
    assert codes.tolist() == [[1]]
    assert residual.dtype == torch.float32


def test_rows_with_nan_take_code_zero_on_every_level():
    codes, residual = ops.residual_quantize(torch.tensor([[float("nan"), 4.0], [4.0, 0.0]]), [FIRST, SECOND])
    assert codes.tolist() == [[0, 0], [1, 0]]
    assert residual[0].isnan().any()


def test_double_precision_stays_double():
    # In fp32 both distances round to -1.
    x = torch.tensor([[1.0]], dtype=torch.float64)
    codes, residual = ops.residual_quantize(x, [torch.tensor([[1.0 + 2e-6], [1.0 + 1e-6]], dtype=torch.float64)])
    assert codes.tolist() == [[1]]
    assert residual.dtype == torch.float64


def test_compiles_in_one_graph():
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(ops.residual_quantize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, [FIRST, SECOND])[0], ops.residual_quantize(x, [FIRST, SECOND])[0])


@pytest.mark.parametrize(
    ("x", "codebooks", "options", "message"),
    [
        (torch.zeros(2), [FIRST], {}, r"x of shape \[B, D\], got \[2\]"),
        (torch.zeros(2, 2, dtype=torch.int64), [FIRST], {}, r"floating-point x .* got x \[2, 2\] int64"),
        (torch.zeros(2, 2), [], {}, "one codebook per level, got .* 0 codebooks"),
        (torch.zeros(2, 2), [FIRST, torch.zeros(0, 2)], {}, r"codebooks\[1\] .* K at least 1, got \[0, 2\]"),
        (torch.zeros(2, 2), [FIRST.to("meta")], {}, r"one device, got x on cpu, codebooks\[0\] on meta"),
        (torch.zeros(2, 2), [FIRST], {"precision": "tf32"}, "ieee, tf32x3, got 'tf32'"),
    ],
    ids=["rank", "dtype", "no level", "empty level", "device", "precision"],
)
def test_bad_input_is_refused(x, codebooks, options, message):
    with pytest.raises(ValueError, match=message):
        ops.residual_quantize(x, codebooks, **options)


def test_wrong_width_names_the_level():
    with pytest.raises(ValueError, match=r"codebooks\[1\]"):
        ops.residual_quantize(torch.zeros(2, 2), [FIRST, torch.zeros(4, 3)])
