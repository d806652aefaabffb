"""Residual addition, dropout and root-mean-square norm."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.cpu.dropout import keep_mask


class _AddRmsNorm(Function):
    """Saves the sum and one factor per row; dropout's mask is the only other thing that the backward needs."""

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
        kept = x if keep is None else x * keep
        total = kept * factor if residual is None else torch.add(residual, kept, alpha=factor)
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=1, keepdim=True).pow_(2).div_(x.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(total, rstd, weight, keep)
        ctx.factor, ctx.x_dtype, ctx.has_residual = factor, x.dtype, residual is not None
        return (wide * rstd).mul_(weight).to(normed_dtype), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd, weight, keep = ctx.saved_tensors
        unit = total * rstd
        grad_unit = grad_normed * unit
        grad_weight = grad_unit.sum(0)
        along = (grad_unit @ weight.to(grad_unit.dtype)).div_(total.shape[1])[:, None]
        grad = (grad_normed * weight).sub_(unit.mul_(along)).mul_(rstd).add_(grad_total)
        grad_x = grad * ctx.factor if keep is None else (grad * keep).mul_(ctx.factor)
        return (
            grad_x.to(ctx.x_dtype),
            grad.to(total.dtype) if ctx.has_residual else None,
            grad_weight.to(weight.dtype),
            None,
            None,
            None,
        )


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout_p: float, normed_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    return _AddRmsNorm.apply(x, residual, weight, eps, dropout_p, normed_dtype)
