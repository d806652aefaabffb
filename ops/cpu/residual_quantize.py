"""Nearest code per level, on distances that stay in a processor's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MAX_DISTANCES = 1 << 18
"""Distances held at once: a megabyte in fp32."""


@torch.no_grad()
def residual_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.residual_quantize`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        levels = [codebook.to(dtype) for codebook in codebooks]
        norms = [level.square().sum(dim=1) for level in levels]
        largest = max(len(level) for level in levels)
        rows = min(max(1, _MAX_DISTANCES // largest), max(1, len(x)))
        buffer = torch.empty(rows * largest, dtype=dtype)
        codes = torch.empty(len(x), len(levels), dtype=torch.int64)
        residual = x.to(dtype, copy=True)
        for begin in range(0, len(x), rows):
            block = residual[begin : begin + rows]
            for index, (level, norm) in enumerate(zip(levels, norms, strict=True)):
                distances = buffer[: len(block) * len(level)].view(len(block), len(level))
                torch.addmm(norm, block, level.T, alpha=-2, out=distances)
                # numpy uses the vector unit, torch compares one by one; both take the first of equals, and NaN first.
                nearest = torch.from_numpy(distances.numpy().argmin(axis=1))
                codes[begin : begin + rows, index] = nearest
                block -= level[nearest]
    return codes, residual
