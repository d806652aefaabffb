"""T5's buckets of relative positions (Raffel et al. 2020, section 2.1)."""

import functools
import math

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def relative_buckets(
    num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool, device: torch.device = _CPU
) -> Tensor:
    """Bucket of every (query, key) pair by key position minus query position.

    Half of the buckets hold one distance each, the rest grow logarithmically up to `max_distance`. Two-sided attention
    uses one half of all buckets per direction; causal attention looks back only.

    Returns:
        [num_queries, num_keys] int64 in 0..num_buckets-1.
    """
    if num_queries == 0 or num_keys == 0:
        return torch.zeros(num_queries, num_keys, dtype=torch.int64, device=device)
    buckets = position_buckets(num_queries, num_keys, num_buckets, max_distance, causal, device)
    return buckets.unfold(0, num_keys, 1).flip(0)


def position_buckets(
    num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool, device: torch.device = _CPU
) -> Tensor:
    """[num_queries + num_keys - 1] int64 buckets of the relative positions from 1 - num_queries on, not to be changed.

    A relative position's pairs are a diagonal of `relative_buckets`. Remembered, unless a compiler is tracing.
    """
    arguments = (num_queries, num_keys, num_buckets, max_distance, causal)
    if torch.compiler.is_compiling():
        return _position_buckets(*arguments).to(device)
    return _remembered(*arguments) if device.type == "cpu" else _on_device(*arguments, device)


def _position_buckets(num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    relative = torch.arange(1 - num_queries, num_keys)
    if causal:
        first, distance = torch.zeros_like(relative), (-relative).clamp_(min=0)
    else:
        num_buckets //= 2
        first, distance = (relative > 0).long() * num_buckets, relative.abs()
    num_exact = num_buckets // 2
    growth = (num_buckets - num_exact) / math.log(max_distance / num_exact)
    far = num_exact + (torch.log(distance.clamp(min=1).float() / num_exact) * growth).long()
    return first + torch.where(distance < num_exact, distance, far.clamp_(max=num_buckets - 1))


@functools.lru_cache(maxsize=64)
def _remembered(num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    with torch.inference_mode(False):  # so that training can use what inference made
        return _position_buckets(num_queries, num_keys, num_buckets, max_distance, causal)


@functools.cache
def _on_device(
    num_queries: int, num_keys: int, num_buckets: int, max_distance: int, causal: bool, device: torch.device
) -> Tensor:
    """A copy at every use would make its host wait; never forgotten, since recorded graphs read it."""
    with torch.inference_mode(False):
        return _position_buckets(num_queries, num_keys, num_buckets, max_distance, causal).to(device)
