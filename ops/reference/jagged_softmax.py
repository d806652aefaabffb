"""Softmax within each packed row, on a padded block."""

import torch
from torch import Tensor

from ops.reference.jagged_to_padded import jagged_to_padded, padded_to_jagged


def jagged_softmax(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_softmax`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = jagged_to_padded(wide, offsets, max_len, -torch.inf)
    return padded_to_jagged(padded.softmax(1), offsets, x.shape[0]).to(x.dtype)
