"""Packed rows to a padded block and back, without a host synchronisation."""

import torch
from torch import Tensor


def row_mask(offsets: Tensor, max_len: int) -> Tensor:
    """[B, max_len] bool, true where a row has a token."""
    return torch.arange(max_len, device=offsets.device) < offsets.diff()[:, None]


def row_of_token(offsets: Tensor, num_tokens: int) -> Tensor:
    """[T] int64 row of every token; B for tokens behind the last boundary, which belong to no row."""
    tokens = torch.arange(num_tokens, dtype=offsets.dtype, device=offsets.device)
    return torch.bucketize(tokens, offsets[1:], right=True)


def jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    """See `ops.jagged_to_padded`."""
    shape = (len(offsets) - 1, max_len, *x.shape[1:])
    if len(x) == 0:
        return x.new_full(shape, pad)
    tokens = offsets[:-1, None].long() + torch.arange(max_len, device=x.device)
    mask = row_mask(offsets, max_len).view(*shape[:2], *[1] * (x.dim() - 1))
    return torch.where(mask, x[tokens.clamp(max=len(x) - 1)], pad)


def padded_to_jagged(x: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """See `ops.padded_to_jagged`."""
    num_rows, max_len = x.shape[:2]
    if num_rows == 0 or max_len == 0:
        return x.new_zeros(num_tokens, *x.shape[2:])
    rows = row_of_token(offsets, num_tokens)
    places = torch.arange(num_tokens, device=x.device) - offsets[rows]
    within = (rows < num_rows).view(-1, *[1] * (x.dim() - 2))
    return torch.where(within, x[rows.clamp(max=num_rows - 1), places.clamp(max=max_len - 1)], 0)
