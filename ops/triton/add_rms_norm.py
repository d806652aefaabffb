"""Residual addition, dropout and root-mean-square norm in one pass over the rows."""

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

_MAX_PROGRAMS = 264
"""Of the backward, each with one row of partial weight gradients: two for every processor of an H100."""


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr,  # [T, D] sub-layer output
    residual_ptr,  # [T, D]; read only if HAS_RESIDUAL
    weight_ptr,  # [D]
    seed_ptr,  # [1] int64; read only if DROPOUT
    normed_ptr,  # [T, D] out, in a dtype of its own
    total_ptr,  # [T, D] out, residual + dropout(x)
    rstd_ptr,  # [T] fp32 out, 1 / root mean square
    num_rows,
    width,
    eps,
    threshold,
    factor,
    HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    total = wide(tl.load(x_ptr + at, mask=mask, other=0.0))
    if DROPOUT:
        keep = keep_mask(seed_ptr, rows, 0, 0, threshold, ROWS, WIDTH)
        total = tl.where(keep, total * factor, 0.0)
    if HAS_RESIDUAL:
        total += wide(tl.load(residual_ptr + at, mask=mask, other=0.0))
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=mask)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, 1) / width + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = wide(tl.load(weight_ptr + columns, mask=columns < width, other=0.0))
    normed = total * rstd[:, None] * weight[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_rms_norm_bwd_kernel(
    grad_normed_ptr,  # [T, D], in normed's dtype
    grad_total_ptr,  # [T, D]; read only if HAS_GRAD_TOTAL
    total_ptr,  # [T, D]
    rstd_ptr,  # [T] fp32
    weight_ptr,  # [D]
    seed_ptr,  # [1] int64; read only if DROPOUT
    grad_x_ptr,  # [T, D] out
    grad_residual_ptr,  # [T, D] out; written only if HAS_RESIDUAL
    partial_ptr,  # [programs, D] fp32 out, weight gradients of each program's rows
    num_rows,
    width,
    threshold,
    factor,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    weight = wide(tl.load(weight_ptr + columns, mask=columns < width, other=0.0))
    grad_weight = tl.zeros([WIDTH], tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        unit = wide(tl.load(total_ptr + at, mask=mask, other=0.0)) * rstd
        grad_normed = wide(tl.load(grad_normed_ptr + at, mask=mask, other=0.0))
        grad_weight += tl.sum(grad_normed * unit, 0)
        grad_unit = grad_normed * weight[None, :]
        along = tl.sum(grad_unit * unit, 1)[:, None] / width
        grad = (grad_unit - unit * along) * rstd
        if HAS_GRAD_TOTAL:
            grad += wide(tl.load(grad_total_ptr + at, mask=mask, other=0.0))
        if HAS_RESIDUAL:
            tl.store(grad_residual_ptr + at, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            grad = tl.where(keep_mask(seed_ptr, rows, 0, 0, threshold, ROWS, WIDTH), grad * factor, 0.0)
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=columns < width)


def _blocks(width: int) -> dict[str, int]:
    """Rows per program so that a block has some 2,048 elements: the backward of a larger one spills registers."""
    padded = power_of_2(width)
    return {"ROWS": max(1, min(16, 2048 // padded)), "WIDTH": padded, "num_warps": max(4, padded // 1024)}


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, rstd = _fake_forward(x, residual, weight, seed, eps, dropout_p, normed_dtype)
    num_rows, width = x.shape
    blocks = _blocks(width)
    _add_rms_norm_fwd_kernel[(cdiv(num_rows, blocks["ROWS"]),)](
        x, x if residual is None else residual, weight, weight if seed is None else seed, normed, total, rstd,
        num_rows, width, eps, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p),
        HAS_RESIDUAL=residual is not None, DROPOUT=seed is not None, **blocks,
    )  # fmt: skip
    return normed, total, rstd


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed, total = torch.empty_like(x, dtype=normed_dtype), torch.empty_like(x, dtype=dtype)
    return normed, total, x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_residual, partials = _fake_backward(
        grad_normed, grad_total, total, rstd, weight, seed, dropout_p, x_dtype, has_residual
    )
    num_rows, width = total.shape
    _add_rms_norm_bwd_kernel[(len(partials),)](
        grad_normed, grad_normed if grad_total is None else grad_total, total, rstd, weight,
        weight if seed is None else seed, grad_x, grad_residual, partials,
        num_rows, width, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p),
        HAS_GRAD_TOTAL=grad_total is not None, HAS_RESIDUAL=has_residual, DROPOUT=seed is not None, **_blocks(width),
    )  # fmt: skip
    return grad_x, grad_residual, partials


def _fake_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = total.shape
    num_programs = min(_MAX_PROGRAMS, cdiv(num_rows, _blocks(width)["ROWS"]))
    grad_residual = torch.empty_like(total) if has_residual else total.new_empty(0)
    partials = total.new_empty(num_programs, width, dtype=torch.float32)
    return torch.empty_like(total, dtype=x_dtype), grad_residual, partials


FORWARD = define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? seed, float eps, float dropout_p, "
    "ScalarType normed_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor rstd, Tensor weight, "
    "Tensor? seed, float dropout_p, ScalarType x_dtype, bool has_residual) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _AddRmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        seed: Tensor | None,
        eps: float,
        dropout_p: float,
        normed_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        normed, total, rstd = FORWARD(x, residual, weight, seed, eps, dropout_p, normed_dtype)
        ctx.save_for_backward(total, rstd, weight, seed)
        # The last norm's stream goes nowhere: its gradient needs no zeros.
        ctx.set_materialize_grads(False)
        ctx.dropout_p, ctx.x_dtype, ctx.has_residual = dropout_p, x.dtype, residual is not None
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, rstd, weight, seed = ctx.saved_tensors
        grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed.contiguous()
        grad_x, grad_residual, partials = BACKWARD(
            grad_normed, None if grad_total is None else grad_total.contiguous(), total, rstd, weight, seed,
            ctx.dropout_p, ctx.x_dtype, ctx.has_residual,
        )  # fmt: skip
        grad_weight = partials.sum(0).to(weight.dtype)
        return grad_x, grad_residual if ctx.has_residual else None, grad_weight, None, None, None, None


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = next_seed(x.device)
    residual = None if residual is None else residual.contiguous()
    return _AddRmsNorm.apply(x.contiguous(), residual, weight.contiguous(), seed, eps, dropout_p, normed_dtype)
