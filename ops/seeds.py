"""Seeds of the dropout inside kernels: single numbers on the device, drawn from torch's generator.

A kernel draws its mask from its seed and from where an element lies (Philox, Salmon et al. 2011), so that its backward
draws the same mask again instead of reading it. Torch's own generator gives the seeds: `torch.manual_seed` fixes them,
checkpoints hold their state, and a CUDA graph gets new ones at every replay.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Pool(threading.local):
    """Seeds that were drawn ahead; every thread has its own, so that none takes another's."""

    def __init__(self) -> None:
        self.seeds: list[Tensor] = []


_pool = _Pool()


@contextmanager
def dropout_seeds(count: int, device: torch.device) -> Iterator[None]:
    """Draw the seeds of the next `count` ops in one go: one kernel launch instead of one for each op.

    Ops beyond `count` draw their own.
    """
    outer = _pool.seeds
    # Every seed lies at a multiple of 16 bytes: for others Triton would compile each kernel a second time.
    _pool.seeds = [pair[:1] for pair in reversed(_draw(2 * count, device).split(2))]
    try:
        yield
    finally:
        _pool.seeds = outer


def next_seed(device: torch.device) -> Tensor:
    """[1] int64 seed on `device` that no other op gets."""
    # The compiler is asked first: it would compile anew for every length of the list that it sees.
    if not torch.compiler.is_compiling() and _pool.seeds and _pool.seeds[-1].device == device:
        return _pool.seeds.pop()
    return _draw(1, device)


def _draw(count: int, device: torch.device) -> Tensor:
    return torch.randint(1 << 62, (count,), dtype=torch.int64, device=device)
