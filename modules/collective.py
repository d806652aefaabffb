"""Rows and sums of all processes that train together: process p holds rows p * B to p * B + B - 1 of a batch.

In a run of one process each function returns what it was given.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _several() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def of_first_process(tensor: Tensor) -> Tensor:
    """The first process's values in all processes, in place."""
    if _several():
        dist.broadcast(tensor, src=0)
    return tensor


def rows_of_all(rows: Tensor) -> Tensor:
    """[P * B, ...] of the [B, ...] that each of P processes holds; without gradient."""
    if not _several():
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(num_processes())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def own_rows(rows: Tensor) -> Tensor:
    """[B, ...] of this process among the [P * B, ...] of all."""
    return rows.chunk(num_processes())[dist.get_rank()] if _several() else rows


def chosen_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """[K, D] rows of all processes' [B, D] by their numbers [K] below P * B, which all processes agree on."""
    if not _several():
        return rows[numbers]
    numbers = numbers - dist.get_rank() * len(rows)
    is_own = (numbers >= 0) & (numbers < len(rows))
    own = rows[numbers.clamp(0, len(rows) - 1)]
    return sum_over_processes(torch.where(is_own[:, None], own, 0))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
