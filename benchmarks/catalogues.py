"""Catalogues of random codes, of any size, and what keeps them in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rungs import UnavailableError


def random_semantic_ids(num_items: int, level_sizes: Sequence[int] = (256, 256, 256)) -> Tensor:
    """[N, L + 1] int64: random codes per level, and the dedup code that tells items of equal codes apart."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(size, (num_items,), generator=generator) for size in level_sizes]
    keys = torch.zeros(num_items, dtype=torch.int64)
    for column, size in zip(columns, level_sizes, strict=True):
        keys = keys * size + column
    keys, order = keys.sort(stable=True)
    places = torch.arange(num_items)
    starts = places.masked_fill(torch.nn.functional.pad(keys[1:] == keys[:-1], (1, 0)), 0).cummax(0).values
    dedup_codes = torch.empty_like(keys).index_copy_(0, order, places - starts)
    return torch.stack([*columns, dedup_codes], dim=1)


def memory_mb(holder: Any) -> float:
    """Of all tensors that an object holds, in attributes and containers at any depth; shared memory counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_of(holder)}
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


def tensors_of(holder: Any) -> Iterator[Tensor]:
    """All tensors of a dataclass, a list, a tuple or a dictionary."""
    if isinstance(holder, Tensor):
        yield holder
    elif is_dataclass(holder):
        yield from tensors_of(vars(holder))
    elif isinstance(holder, dict):
        yield from tensors_of(list(holder.values()))
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from tensors_of(value)


def require_memory(needed_mb: float, what: str, device: str) -> None:
    """Stop before a machine runs out of memory.

    Raises:
        UnavailableError: if the device has less memory left.
    """
    free_mb = _available_mb(device)
    if free_mb is not None and needed_mb > free_mb:
        raise UnavailableError(f"{what} needs about {needed_mb:,.0f} MB, {free_mb:,.0f} MB are free")


def _available_mb(device: str) -> float | None:
    """Memory that can be had; None where that is not known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] / 2**20
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable")), None)
