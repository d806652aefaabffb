"""Residual addition, dropout and root-mean-square norm."""

import torch
from torch import Tensor

from ops.reference.dropout import dropout


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`; without `normed_dtype` both results have the wider of the inputs' dtypes."""
    kept = dropout(x, dropout_p, seed)
    total = kept if residual is None else residual + kept
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    rstd = (wide.square().mean(dim=1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(normed_dtype or total.dtype), total
