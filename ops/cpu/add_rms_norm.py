"""Residual addition, dropout and root-mean-square norm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.cpu.blocks import row_blocks
from ops.cpu.dropout import keep_mask

_BLOCK_ROWS = 1024


class _AddRmsNorm(Function):
    """Saves the sum and one factor per row; dropout's mask is the only other thing that the backward needs.

    Works in blocks of rows: temporaries of a whole batch cost more in fresh memory pages than all of the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        dropout_p: float,
        normed_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        keep = keep_mask(x.shape, dropout_p, x.device) if dropout_p > 0.0 else None
        factor = 1.0 / (1.0 - dropout_p)
        total_dtype = x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)
        total, normed = torch.empty_like(x, dtype=total_dtype), torch.empty_like(x, dtype=normed_dtype)
        rstd = x.new_empty(len(x), 1, dtype=torch.promote_types(total_dtype, torch.float32))
        for rows in row_blocks(x, _BLOCK_ROWS):
            kept = x[rows] if keep is None else x[rows] * keep[rows]
            if residual is None:
                torch.mul(kept, factor, out=total[rows])
            else:
                torch.add(residual[rows], kept, alpha=factor, out=total[rows])
            wide = total[rows].to(rstd.dtype)
            norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=rstd[rows])
            scale = norms.pow_(2).div_(x.shape[1]).add_(eps).rsqrt_()
            normed[rows] = (wide * scale).mul_(weight)
        ctx.save_for_backward(total, rstd, weight, keep)
        ctx.factor, ctx.x_dtype, ctx.has_residual = factor, x.dtype, residual is not None
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd, weight, keep = ctx.saved_tensors
        grad_x = torch.empty_like(total, dtype=ctx.x_dtype)
        grad_residual = torch.empty_like(total) if ctx.has_residual else None
        grad_weight = torch.zeros_like(weight, dtype=rstd.dtype)
        for rows in row_blocks(total, _BLOCK_ROWS):
            unit = total[rows] * rstd[rows]
            grad_unit = grad_normed[rows] * unit
            grad_weight += grad_unit.sum(0)
            along = (grad_unit @ weight.to(grad_unit.dtype)).div_(total.shape[1])[:, None]
            grad = (grad_normed[rows] * weight).sub_(unit.mul_(along)).mul_(rstd[rows]).add_(grad_total[rows])
            if grad_residual is not None:
                grad_residual[rows] = grad
            grad_x[rows] = grad.mul_(ctx.factor) if keep is None else grad.mul_(keep[rows]).mul_(ctx.factor)
        return grad_x, grad_residual, grad_weight.to(weight.dtype), None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout_p: float, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    return _AddRmsNorm.apply(x, residual, weight, eps, dropout_p, normed_dtype)
