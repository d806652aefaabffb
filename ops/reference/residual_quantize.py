"""Nearest code per level of a residual quantizer (Zeghidour et al. 2021, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_DISTANCES = 1 << 22
"""Distances held at once, so that memory does not grow with the number of rows."""


@torch.no_grad()
def residual_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes of x, level by level, each level quantizing what the levels before it left over.

    Computes in fp32 whatever the dtype of x (in fp64 when x is fp64), without gradient, in blocks of rows.

    Args:
        x: [B, D] floating point.
        codebooks: one [K_l, D] per level.

    Returns:
        codes [B, L] int64, the lowest index among equal computed distances, and the residual [B, D] left after the
        last level.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        levels = [codebook.to(dtype) for codebook in codebooks]
        norms = [level.square().sum(dim=1) for level in levels]
        rows = max(1, _MAX_DISTANCES // max(len(level) for level in levels))
        codes = torch.empty(len(x), len(levels), dtype=torch.int64, device=x.device)
        residual = x.to(dtype, copy=True)
        for begin in range(0, len(x), rows):
            block = residual[begin : begin + rows]
            for index, (level, norm) in enumerate(zip(levels, norms, strict=True)):
                # The squared distance less |x|^2, which is the same for every code.
                nearest = torch.addmm(norm, block, level.T, alpha=-2).argmin(dim=1)
                codes[begin : begin + rows, index] = nearest
                block -= level[nearest]
    return codes, residual
