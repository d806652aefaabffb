"""Causal attention with pointwise SiLU within jagged rows, on padded blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.reference.jagged_to_padded import jagged_to_padded, padded_to_jagged


def jagged_silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_len: int,
    scale: float,
    normalizer: float,
    bias: Tensor | None,
) -> Tensor:
    """See `ops.jagged_silu_attention`; places that a row does not have hold zeros, which add nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (jagged_to_padded(x, offsets, max_len, 0.0) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys).to(wide) * scale
    places = torch.arange(max_len, device=q.device)
    distances = places[:, None] - places
    if bias is not None:
        scores = scores + bias[distances.clamp(min=0)].permute(2, 0, 1).to(wide)
    weights = F.silu(scores).masked_fill(distances < 0, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), values)
    return padded_to_jagged(out / normalizer, offsets, len(q))
