"""Attention row by row in plain PyTorch, the twin that the jagged op is tested against."""

import torch
from torch import Tensor


def t5_bucket(relative: int, num_buckets: int, max_distance: int, *, causal: bool) -> int:
    """One relative position's bucket in scalar arithmetic."""
    import math

    bucket = 0
    if causal:
        distance = max(-relative, 0)
    else:
        num_buckets //= 2
        bucket, distance = (num_buckets if relative > 0 else 0), abs(relative)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact))
    return bucket + min(far, num_buckets - 1)


def row_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: Tensor | None, max_distance: int, *, causal: bool
) -> Tensor:
    """[nq, H, D], [nk, H, D] -> [nq, H, D]."""
    if len(k) == 0:
        return q * 0.0
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if table is not None:
        buckets = torch.tensor(
            [[t5_bucket(j - i, len(table), max_distance, causal=causal) for j in range(len(k))] for i in range(len(q))]
        ).view(len(q), len(k))
        scores = scores + table[buckets].permute(2, 0, 1)
    if causal:
        scores = scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def twin_attention(
    q: Tensor,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    scale: float,
    table: Tensor | None = None,
    max_distance: int = 128,
    *,
    causal: bool = False,
) -> Tensor:
    """What `ops.jagged_attention` gives without dropout."""
    rows = []
    bounds_q, bounds_k = offsets_q.tolist(), offsets_k.tolist()
    for row in range(len(bounds_q) - 1):
        own = slice(bounds_q[row], bounds_q[row + 1])
        other = slice(bounds_k[row], bounds_k[row + 1])
        rows.append(row_attention(q[own], kv[other, 0], kv[other, 1], scale, table, max_distance, causal=causal))
    return torch.cat(rows)
