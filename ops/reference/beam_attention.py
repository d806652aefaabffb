"""Attention of beams over their ancestors during generation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _ancestors_of(cache: Sequence[Tensor], ancestors: Tensor) -> Tensor:
    """[B, W, steps, H, D]: what each beam's own ancestors left at every step."""
    rows = torch.arange(len(ancestors), device=ancestors.device)[:, None]
    return torch.stack([entry[rows, ancestors[:, :, step]] for step, entry in enumerate(cache)], dim=2)


def beam_self_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ancestors: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """See `ops.beam_self_attention`."""
    k, v = _ancestors_of(keys, ancestors), _ancestors_of(values, ancestors)
    scores = torch.einsum("bwhd,bwshd->bwhs", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bwhs,bwshd->bwhd", scores.softmax(dim=-1).to(v.dtype), v)
