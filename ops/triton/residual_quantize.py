"""Nearest codes of all levels in one launch: rows and what is left of them stay in registers between levels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.library import define
from ops.triton.parts import INTERPRET, cdiv, dot, power_of_2, wide

_MANY_ROWS = 16_384
"""From here on blocks of 64 rows fill an H100's processors; fewer rows take smaller blocks."""


@triton.jit
def _residual_quantize_fwd_kernel(
    x_ptr,  # [B, D]
    codebook_ptrs,  # tuple with a [K_l, D] fp32 per level
    sizes,  # tuple with a K_l per level; not constants, since the compiler would unroll the loops and spill
    codes_ptr,  # [B, L] int64 out
    residual_ptr,  # [B, D] fp32 out, what is left after the last level
    num_rows,
    width,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    num_levels: tl.constexpr = len(codebook_ptrs)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    left = wide(tl.load(x_ptr + at, mask=mask, other=0.0))
    for level in tl.static_range(num_levels):
        codebook_ptr = codebook_ptrs[level]
        size = sizes[level]
        nearest = tl.zeros([ROWS], tl.int32)
        smallest = tl.full([ROWS], float("inf"), tl.float32)
        for first in range(0, size, CODES):
            numbers = first + tl.arange(0, CODES)
            exists = numbers < size
            code_at = numbers[:, None] * width + columns[None, :]
            codes = tl.load(codebook_ptr + code_at, mask=exists[:, None] & (columns < width)[None, :], other=0.0)
            # The squared distance less |x|^2, which is the same for every code.
            distance = tl.sum(codes * codes, 1)[None, :] - 2.0 * _product(left, tl.trans(codes), PRECISION)
            distance = tl.where(exists[None, :] & (distance == distance), distance, float("inf"))
            best, index = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
            # Strictly less: of equal codes in different blocks the first stays, and so does 0 where all were NaN.
            closer = best < smallest
            nearest = tl.where(closer, first + index, nearest)
            smallest = tl.where(closer, best, smallest)
        tl.store(codes_ptr + rows * num_levels + level, nearest.to(tl.int64), mask=rows < num_rows)
        left -= tl.load(codebook_ptr + nearest[:, None] * width + columns[None, :], mask=mask, other=0.0)
    tl.store(residual_ptr + at, left, mask=mask)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    if INTERPRET or PRECISION == "ieee":
        return dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


def _blocks(num_rows: int, width: int, largest: int) -> dict[str, int]:
    """Some 4,096 distances per program, and at most 8,192 numbers of the codes beside them, of wide ones half as many:
    more would spill.
    """
    padded = power_of_2(width)
    rows = 64 if num_rows >= _MANY_ROWS and padded <= 32 else 16
    numbers = 8192 if padded <= 64 else 4096
    codes = max(16, min(4096 // rows, numbers // padded, power_of_2(largest)))
    return {"ROWS": rows, "CODES": codes, "WIDTH": padded, "num_warps": 4 if padded <= 32 else 8, "num_stages": 2}


def _forward(x: Tensor, codebooks: Sequence[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    codes, residual = _fake_forward(x, codebooks, precision)
    sizes = tuple(len(codebook) for codebook in codebooks)
    launch = _blocks(len(x), x.shape[1], max(sizes))
    _residual_quantize_fwd_kernel[(cdiv(len(x), launch["ROWS"]),)](
        x, tuple(codebooks), sizes, codes, residual, len(x), x.shape[1], PRECISION=precision, **launch
    )
    return codes, residual


def _fake_forward(x: Tensor, codebooks: Sequence[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], len(codebooks), dtype=torch.int64), torch.empty_like(x, dtype=torch.float32)


FORWARD = define(
    "residual_quantize(Tensor x, Tensor[] codebooks, str precision) -> (Tensor, Tensor)", _forward, _fake_forward
)


def residual_quantize(x: Tensor, codebooks: Sequence[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    """See `ops.residual_quantize`."""
    levels = [codebook.detach().float().contiguous() for codebook in codebooks]
    return FORWARD(x.detach().contiguous(), levels, precision)
