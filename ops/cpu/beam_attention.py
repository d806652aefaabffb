"""Attention of beams over their ancestors during generation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.cpu.jagged_attention import jagged_attention


def beam_cross_attention(q: Tensor, kv: Tensor, offsets_k: Tensor, max_k: int, scale: float) -> Tensor:
    """See `ops.beam_cross_attention`: the beams of a row are queries of one packed row."""
    num_rows, num_beams = q.shape[:2]
    offsets_q = torch.arange(num_rows + 1, dtype=torch.int32) * num_beams
    out = jagged_attention(
        q.flatten(0, 1), kv, offsets_q, offsets_k, num_beams, max_k, scale, None, 128, causal=False, dropout_p=0.0
    )
    return out.view(q.shape)


def beam_self_attention(q: Tensor, cache: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """See `ops.beam_self_attention`.

    With one query per beam and a handful of steps there is nothing to multiply as matrices: each step's keys and values
    are gathered once, and used while they are in cache.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_wide = q.to(wide)
    scores = torch.stack([(q_wide * k).sum(-1) for k in _of_ancestors(cache, 0, ancestors)], dim=-1) * scale
    if bias is not None:
        scores = scores + bias
    probabilities = scores.softmax(dim=-1)
    out = torch.zeros_like(q_wide)
    for step, v in enumerate(_of_ancestors(cache, 1, ancestors)):
        out.addcmul_(probabilities[..., step, None], v.to(wide))
    return out.to(q.dtype)


def _of_ancestors(cache: Tensor, part: int, ancestors: Tensor) -> Iterator[Tensor]:
    """For every step, what each beam's own ancestor left there: keys (part 0) or values (1), [B, W, H, D].

    Copied only where ancestors really differ: the first step has one beam, [B, 1, H, D], and in the newest every beam
    is its own ancestor.
    """
    num_rows, num_beams, num_steps = ancestors.shape
    rows, beams = torch.arange(num_rows)[:, None], torch.arange(num_beams)
    for step in range(num_steps):
        entry, slots = cache[step, :, :, part], ancestors[:, :, step]
        if bool((slots == slots[:, :1]).all()):
            yield entry[rows, slots[:, :1]]
        elif bool((slots == beams).all()):
            yield entry[:, :num_beams]
        else:
            places = (rows * cache.shape[2] + slots).flatten()
            yield entry.flatten(0, 1).index_select(0, places).view(num_rows, num_beams, *entry.shape[2:])
