"""Sum and mean of the tokens of each packed row."""

import torch
from torch import Tensor

from ops.reference.jagged_to_padded import jagged_to_padded


def jagged_sum(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_sum`."""
    return _wide_sum(x, offsets, max_len).to(x.dtype)


def jagged_mean(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_mean`."""
    return (_wide_sum(x, offsets, max_len) / offsets.diff().clamp(min=1)[:, None]).to(x.dtype)


def _wide_sum(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    return jagged_to_padded(x.to(torch.promote_types(x.dtype, torch.float32)), offsets, max_len, 0.0).sum(1)
