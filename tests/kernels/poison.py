"""Fresh memory that shows: what a kernel should have written and did not is NaN, or an absurd whole number."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

WHOLE_NUMBERS = {torch.int64: 0x5EADBEEF5EADBEEF, torch.int32: 0x5EADBEEF, torch.int16: 0x5EAD}
"""Too large for an index or a count, in either half."""


@contextmanager
def poisoned_memory(poison: float = torch.nan) -> Iterator[None]:
    """Within the block, torch.empty, torch.empty_like and Tensor.new_empty fill what they return.

    Another `poison` than NaN, for floating-point tensors, is equal to itself.
    """
    with (
        mock.patch.object(torch, "empty", _filling(torch.empty, poison)),
        mock.patch.object(torch, "empty_like", _filling(torch.empty_like, poison)),
        mock.patch.object(Tensor, "new_empty", _filling(Tensor.new_empty, poison)),
    ):
        yield


def _filling(allocate, poison):
    def allocate_and_fill(*arguments, **options):
        out = allocate(*arguments, **options)
        if torch.compiler.is_compiling():
            return out
        with torch.no_grad():
            return _fill(out, poison)

    return allocate_and_fill


def _fill(out: Tensor, poison: float) -> Tensor:
    if out.is_floating_point() or out.is_complex():
        return out.fill_(poison)
    return out.fill_(WHOLE_NUMBERS.get(out.dtype, 0x5B))
