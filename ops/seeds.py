"""Seeds of the dropout inside kernels: single numbers on the device, drawn from torch's generator.

A kernel draws its mask from its seed and from where an element lies (Philox, Salmon et al. 2011), so that its backward
draws the same mask again instead of reading it. Torch's own generator gives the seeds: `torch.manual_seed` fixes them,
checkpoints hold their state, and a CUDA graph gets new ones at every replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_pool: list[Tensor] = []


@contextmanager
def dropout_seeds(count: int, device: torch.device) -> Iterator[None]:
    """Draw the seeds of the next `count` ops in one go: one kernel launch instead of one for each op.

    Ops beyond `count` draw their own.
    """
    outer = _pool[:]
    _pool[:] = reversed(_draw(count, device).split(1))
    try:
        yield
    finally:
        _pool[:] = outer


def next_seed(device: torch.device) -> Tensor:
    """[1] int64 seed on `device` that no other op gets."""
    if _pool and _pool[-1].device == device and not torch.compiler.is_compiling():
        return _pool.pop()
    return _draw(1, device)


def _draw(count: int, device: torch.device) -> Tensor:
    return torch.randint(1 << 62, (count,), dtype=torch.int64, device=device)
