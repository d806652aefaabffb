"""Prefix trie of code tuples as compressed sparse rows, by sorting."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_KEY_BITS = 63
_MAX_INT16 = torch.iinfo(torch.int16).max


class TrieLevel(NamedTuple):
    """The edges that lead from the nodes of one depth to the nodes of the next.

    Edge e of a level arrives at node e of the next depth: edges are sorted by (parent node, code), so node numbers
    ascend in code order and no array of children is needed.

    Attributes:
        row_ptr: [M+1] int32; the edges of node m are row_ptr[m]..row_ptr[m+1].
        codes: [E] int16, or int32 where int16 does not suffice; the code of every edge.
    """

    row_ptr: Tensor
    codes: Tensor


def build_trie(codes: Tensor) -> tuple[list[TrieLevel], Tensor]:
    """See `ops.build_trie`."""
    num_bits = [int(highest).bit_length() for highest in codes.amax(0).tolist()]
    if sum(num_bits) <= _KEY_BITS:
        order, columns = _order_by_key(codes, num_bits)
    else:
        order, columns = _order_by_column(codes)
    levels = []
    differs = torch.zeros(len(codes) - 1, dtype=torch.bool, device=codes.device)
    parents = order.new_zeros(1)
    for column in columns:
        differs |= column[1:] != column[:-1]
        level, nodes = _level(column, pad(differs, (1, 0), value=True), parents)
        levels.append(level)
        parents = nodes
    if len(parents) < len(codes):
        numbers = _numbers_within(parents, len(codes))
        levels.append(_level(numbers, torch.ones_like(numbers, dtype=torch.bool), parents)[0])
    return levels, order.int()


def _order_by_key(codes: Tensor, num_bits: list[int]) -> tuple[Tensor, Iterator[Tensor]]:
    """Row numbers in ascending order of the rows, equal rows as they were, and the columns in that order.

    A row is one number, the bits of its codes behind each other, so that one sort suffices.
    """
    keys = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for column, width in zip(codes.unbind(1), num_bits, strict=True):
        keys = (keys << width) | column
    keys, order = keys.sort(stable=True)

    def columns() -> Iterator[Tensor]:
        shift = sum(num_bits)
        for width in num_bits:
            shift -= width
            yield (keys >> shift) & ((1 << width) - 1)

    return order, columns()


def _order_by_column(codes: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """As `_order_by_key`, by one stable sort per column, the least significant first."""
    order = torch.arange(len(codes), device=codes.device)
    for column in reversed(codes.unbind(1)):
        order = order[column[order].argsort(stable=True)]
    return order, (column[order] for column in codes.unbind(1))


def _level(column: Tensor, is_first: Tensor, parents: Tensor) -> tuple[TrieLevel, Tensor]:
    """A level from the ordered rows.

    Args:
        column: [N] codes of the level.
        is_first: [N] bool, which rows are the first with their prefix.
        parents: positions of the rows that are the first with a prefix one code shorter.

    Returns:
        the level, and where in the order its edges begin.
    """
    begins = is_first.nonzero().squeeze(1)
    edges_before = is_first.cumsum(0, dtype=torch.int32) - 1
    row_ptr = pad(edges_before[parents], (0, 1), value=len(begins))
    codes = column[begins]
    dtype = torch.int16 if int(codes.max()) <= _MAX_INT16 else torch.int32
    return TrieLevel(row_ptr, codes.to(dtype)), begins


def _numbers_within(begins: Tensor, length: int) -> Tensor:
    """[length] 0, 1, ... anew from each of the ascending positions `begins`, the first of which is 0."""
    sizes = pad(begins, (0, 1), value=length).diff()
    return torch.arange(length, device=begins.device) - begins.repeat_interleave(sizes)
