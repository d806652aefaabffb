"""T5's buckets of relative positions (Raffel et al. 2020, section 2.1)."""

import math

import torch
from torch import Tensor


def relative_buckets(num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Bucket of every (query, key) pair by key position minus query position.

    Half of the buckets hold one distance each, the rest grow logarithmically up to `max_distance`. Two-sided attention
    uses one half of all buckets per direction; causal attention looks back only.

    Returns:
        [num_queries, num_keys] int64 in 0..num_buckets-1, on the CPU.
    """
    relative = torch.arange(num_keys)[None, :] - torch.arange(num_queries)[:, None]
    if causal:
        first, distance, num_buckets = torch.zeros_like(relative), (-relative).clamp_(min=0), num_buckets
    else:
        num_buckets //= 2
        first, distance = (relative > 0).long() * num_buckets, relative.abs()
    num_exact = num_buckets // 2
    growth = (num_buckets - num_exact) / math.log(max_distance / num_exact)
    far = num_exact + (torch.log(distance.clamp(min=1).float() / num_exact) * growth).long()
    return first + torch.where(distance < num_exact, distance, far.clamp_(max=num_buckets - 1))
