"""Packed rows to a padded block and back, without a host synchronisation."""

import torch
from torch import Tensor


def row_mask(offsets: Tensor, max_len: int) -> Tensor:
    """[B, max_len] bool, true where a row has a token."""
    return torch.arange(max_len, device=offsets.device) < offsets.diff()[:, None]


def row_of_token(offsets: Tensor, num_tokens: int) -> Tensor:
    """[T] int64 row of every token; B for tokens behind the last boundary, which belong to no row."""
    lengths = torch.nn.functional.pad(offsets, (0, 1), value=num_tokens).diff()
    rows = torch.arange(offsets.shape[0], device=offsets.device)
    return torch.repeat_interleave(rows, lengths, output_size=num_tokens)


def jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    """See `ops.jagged_to_padded`."""
    tokens = offsets[:-1, None].long() + torch.arange(max_len, device=x.device)
    last = x.shape[0]  # of the tokens with one more, the padding
    with_padding = torch.cat([x, x.new_full((1, *x.shape[1:]), pad)])
    return with_padding[torch.where(row_mask(offsets, max_len), tokens, last)]


def padded_to_jagged(x: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """See `ops.padded_to_jagged`."""
    num_rows, max_len = x.shape[:2]
    rows = row_of_token(offsets, num_tokens)
    places = rows * max_len + torch.arange(num_tokens, device=x.device) - offsets[rows]
    last = num_rows * max_len  # of the places with one more, the zeros of the tail
    with_zeros = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
    return with_zeros[places.where(rows < num_rows, last)]
