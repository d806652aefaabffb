"""Dropout with a mask that the backward draws again."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.seeds import next_seed
from ops.triton.library import define
from ops.triton.parts import cdiv, keep_mask, power_of_2, threshold_of, wide


@triton.jit
def _dropout_kernel(
    x_ptr,  # [R, C]; values, or their incoming gradients: dropout is its own backward
    seed_ptr,  # [1] int64
    out_ptr,  # [R, C] out
    num_rows,
    num_columns,
    column_blocks,
    threshold,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) % column_blocks * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    x = wide(tl.load(x_ptr + at, mask=mask, other=0.0))
    kept = tl.where(keep_mask(seed_ptr, rows, first_column, 0, threshold, ROWS, COLUMNS), x * factor, 0.0)
    tl.store(out_ptr + at, kept.to(out_ptr.dtype.element_ty), mask=mask)


def tiles(num_rows: int, num_columns: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, blocks per row and block sizes of an elementwise kernel: some 2,048 elements per program."""
    columns = min(power_of_2(num_columns), 1024)
    rows = 2048 // columns
    column_blocks = cdiv(num_columns, columns)
    return (cdiv(num_rows, rows) * column_blocks,), column_blocks, {"ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def _launch(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    out = torch.empty_like(x)
    num_columns = x.shape[-1] if x.dim() else 1
    num_rows = x.numel() // max(num_columns, 1)
    grid, column_blocks, blocks = tiles(num_rows, num_columns)
    _dropout_kernel[grid](
        x, seed, out, num_rows, num_columns, column_blocks, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p), **blocks
    )
    return out


def _fake(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    return torch.empty_like(x)


FORWARD = define("dropout(Tensor x, Tensor seed, float dropout_p) -> Tensor", _launch, _fake)
BACKWARD = define("dropout_backward(Tensor grad, Tensor seed, float dropout_p) -> Tensor", _launch, _fake)


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout_p = dropout_p
        return FORWARD(x, seed, dropout_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return BACKWARD(grad.contiguous(), seed, ctx.dropout_p), None, None


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None = None) -> Tensor:
    """See `ops.dropout`."""
    if dropout_p == 0.0:
        return x
    return _Dropout.apply(x.contiguous(), next_seed(x.device) if seed is None else seed, dropout_p)
