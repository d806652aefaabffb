"""Packed rows to a padded block and back."""

import torch
from torch import Tensor


def row_mask(offsets: Tensor, max_len: int) -> Tensor:
    """[B, max_len] bool, true where a row has a token."""
    return torch.arange(max_len, device=offsets.device) < offsets.diff()[:, None]


def jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    """See `ops.jagged_to_padded`."""
    padded = x.new_full((len(offsets) - 1, max_len, *x.shape[1:]), pad)
    padded[row_mask(offsets, max_len)] = x
    return padded


def padded_to_jagged(x: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """See `ops.padded_to_jagged`."""
    return x[row_mask(offsets, x.shape[1])]
