"""Prefix trie of code tuples as compressed sparse rows, by sorting."""

from typing import NamedTuple

import torch
from torch import Tensor

from data.schemas import InputError


class TrieLevel(NamedTuple):
    """The edges that lead from the nodes of one depth to the nodes of the next.

    Edge e of a level arrives at node e of the next depth: edges are sorted by (parent node, code), so node numbers
    ascend in code order and no array of children is needed.

    Attributes:
        row_ptr: [M+1] int32; the edges of node m are row_ptr[m]..row_ptr[m+1].
        codes: [E] int32, the code of every edge.
    """

    row_ptr: Tensor
    codes: Tensor


def build_trie(codes: Tensor) -> tuple[list[TrieLevel], Tensor]:
    """Trie of distinct code tuples; leaf i is the i-th tuple in lexicographic order.

    Args:
        codes: [N, L] int64, not negative.

    Returns:
        one TrieLevel per column, and leaf_rows [N] int64, the row of `codes` that each leaf stands for.

    Raises:
        InputError: if two rows are equal.
    """
    leaf_rows = _lexicographic_order(codes)
    ordered = codes[leaf_rows]
    differs = ordered[1:] != ordered[:-1]
    first = torch.ones(1, dtype=torch.bool, device=codes.device)
    levels = []
    node_of_row = torch.zeros_like(leaf_rows)
    num_nodes = 1
    for column in range(codes.shape[1]):
        starts_node = torch.cat([first, differs[:, : column + 1].any(1)])
        num_edges = torch.bincount(node_of_row[starts_node], minlength=num_nodes)
        row_ptr = torch.nn.functional.pad(num_edges.cumsum(0), (1, 0))
        levels.append(TrieLevel(row_ptr.int(), ordered[starts_node, column].int()))
        node_of_row = starts_node.cumsum(0) - 1
        num_nodes = len(levels[-1].codes)
    if num_nodes < len(codes):
        raise InputError(_duplicate_message(codes, leaf_rows, differs))
    return levels, leaf_rows


def _lexicographic_order(codes: Tensor) -> Tensor:
    """Row numbers in ascending order of the rows: one stable sort per column, the least significant first."""
    order = torch.arange(len(codes), device=codes.device)
    for column in reversed(codes.unbind(1)):
        order = order[column[order].argsort(stable=True)]
    return order


def _duplicate_message(codes: Tensor, order: Tensor, differs: Tensor) -> str:
    repeats = (~differs.any(1)).nonzero().squeeze(1)
    first, second = order[repeats[0] : repeats[0] + 2].tolist()
    return (
        f"build_trie expected distinct code tuples, got {len(repeats)} repeats; "
        f"rows {first} and {second} are both {tuple(codes[first].tolist())}. "
        "Give colliding items a dedup code (SemanticIdTokenizer.fit does)."
    )
