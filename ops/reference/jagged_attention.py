"""Attention within jagged rows, on padded blocks."""

import torch
from torch import Tensor

from ops.reference.jagged_to_padded import jagged_to_padded, padded_to_jagged, row_mask
from ops.reference.philox import seeded_keep
from ops.reference.relative_buckets import relative_buckets


def jagged_attention(
    q: Tensor | None,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    bias_table: Tensor | None,
    max_distance: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """See `ops.jagged_attention` and, with q None and kv [T, 3, H, D], `ops.jagged_self_attention`.

    Every pair of a row attends or is masked, without a host synchronisation. The mask of a seed numbers rows by packed
    query and columns by the key's place in its row, one plane per head.
    """
    if q is None:
        q, kv = kv[:, 0], kv[:, 1:]
    num_heads = q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = jagged_to_padded(q, offsets_q, max_q, 0.0)
    keys, values = jagged_to_padded(kv, offsets_k, max_k, 0.0).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys).to(wide) * scale
    if bias_table is not None:
        buckets = relative_buckets(max_q, max_k, len(bias_table), max_distance, causal, q.device)
        scores = scores + bias_table[buckets].permute(2, 0, 1).to(wide)
    visible = row_mask(offsets_k, max_k)[:, None, None, :]
    if causal:
        visible = visible & torch.ones(max_q, max_k, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, torch.finfo(wide).min)
    probabilities = scores.softmax(-1).masked_fill(~visible, 0.0)
    if dropout_p > 0.0:
        if seed is None:
            keep = torch.rand_like(probabilities) >= dropout_p
        else:
            planes = [seeded_keep(seed, dropout_p, len(q), max_k, plane=head) for head in range(num_heads)]
            keep = jagged_to_padded(torch.stack(planes, 1), offsets_q, max_q, False).transpose(1, 2)
        probabilities = torch.where(keep, probabilities / (1.0 - dropout_p), 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities.to(values.dtype), values)
    return padded_to_jagged(out, offsets_q, len(q))
