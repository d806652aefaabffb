"""Attention of beams, over their row's keys and over their ancestors, during generation."""

import torch
from torch import Tensor

from ops.reference.jagged_to_padded import jagged_to_padded, row_mask


def beam_cross_attention(q: Tensor, kv: Tensor, offsets_k: Tensor, max_k: int, scale: float) -> Tensor:
    """See `ops.beam_cross_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = jagged_to_padded(kv, offsets_k, max_k, 0.0).unbind(2)
    visible = row_mask(offsets_k, max_k)[:, None, None, :]
    scores = torch.einsum("bwhd,bkhd->bhwk", q, keys).to(wide) * scale
    probabilities = scores.masked_fill(~visible, torch.finfo(wide).min).softmax(-1).masked_fill(~visible, 0.0)
    return torch.einsum("bhwk,bkhd->bwhd", probabilities.to(values.dtype), values)


def beam_self_attention(q: Tensor, cache: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """See `ops.beam_self_attention`. Products are not matrix products, which autocast would narrow."""
    wide = torch.promote_types(q.dtype, torch.float32)
    steps = torch.arange(ancestors.shape[2], device=q.device)
    rows = torch.arange(len(q), device=q.device)[:, None, None]
    keys, values = cache[steps, rows, ancestors].to(wide).unbind(3)  # [B, W, steps, H, D]
    scores = (q.to(wide)[:, :, None] * keys).sum(-1) * scale
    if bias is not None:
        scores = scores + bias.t()
    return (scores.softmax(2)[..., None] * values).sum(2).to(q.dtype)
