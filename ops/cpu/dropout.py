"""Dropout with a cheap random mask: one 64-bit word of torch's generator serves four elements."""

import torch
from torch import Tensor

_LEVELS = 1 << 16


def keep_mask(shape: torch.Size | tuple[int, ...], dropout_p: float, device: torch.device) -> Tensor:
    """Int16 mask, 0 with probability `dropout_p` (exact to 1/65536, and never 0 or 1), else 1.

    Random 16-bit numbers are clamped to two neighbouring values in place, which is far cheaper than a comparison; an
    integer mask multiplies floats at full speed, unlike a bool one.
    """
    num_elements = torch.Size(shape).numel()
    words = torch.empty((num_elements + 3) // 4, dtype=torch.int64, device=device).random_(-(1 << 63), None)
    lanes = words.view(torch.int16)[:num_elements].view(shape)
    threshold = min(max(round(dropout_p * _LEVELS), 1), _LEVELS - 1) - _LEVELS // 2
    return lanes.clamp_(threshold - 1, threshold).sub_(threshold - 1)


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """See `ops.dropout`."""
    if dropout_p == 0.0:
        return x
    return x * (keep_mask(x.shape, dropout_p, x.device) * (1.0 / (1.0 - dropout_p))).to(x.dtype)
