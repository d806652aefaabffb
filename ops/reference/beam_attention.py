"""Attention of beams over their ancestors during generation."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def beam_self_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ancestors: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """See `ops.beam_self_attention`.

    With one query per beam and a handful of steps there is nothing to multiply as matrices: each step's keys and values
    are gathered once, and used while they are in cache.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_wide = q.to(dtype)
    scores = torch.stack([(q_wide * k).sum(-1) for k in _of_ancestors(keys, ancestors)], dim=-1) * scale
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1)
    out = torch.zeros_like(q_wide)
    for step, v in enumerate(_of_ancestors(values, ancestors)):
        out.addcmul_(probabilities[..., step, None], v.to(dtype))
    return out.to(q.dtype)


def _of_ancestors(cache: Sequence[Tensor], ancestors: Tensor) -> Iterator[Tensor]:
    """For every step, [B, W, H, D]: what each beam's own ancestor left there."""
    num_rows, num_beams, _ = ancestors.shape
    rows = torch.arange(num_rows, device=ancestors.device)[:, None]
    for step, entry in enumerate(cache):
        slots = rows * entry.shape[1] + ancestors[:, :, step]
        yield entry.flatten(0, 1).index_select(0, slots.flatten()).view(num_rows, num_beams, *entry.shape[2:])
