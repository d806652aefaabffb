"""Dropout."""

import torch
from torch import Tensor

from ops.reference.philox import seeded_keep


def keep_mask(
    shape: torch.Size | tuple[int, ...], dropout_p: float, device: torch.device, seed: Tensor | None
) -> Tensor:
    """Bool mask, false with probability `dropout_p`: that of the kernels for a given seed, else from torch's generator.

    All leading dimensions together are the rows of the kernels' mask, the last one its columns.
    """
    if seed is None:
        return torch.rand(shape, device=device) >= dropout_p
    num_columns = shape[-1] if len(shape) else 1
    num_rows = torch.Size(shape).numel() // max(num_columns, 1)
    return seeded_keep(seed, dropout_p, num_rows, num_columns).view(shape)


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None = None) -> Tensor:
    """See `ops.dropout`."""
    if dropout_p == 0.0:
        return x
    return torch.where(keep_mask(x.shape, dropout_p, x.device, seed), x / (1.0 - dropout_p), 0.0).to(x.dtype)
