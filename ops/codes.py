"""Ops on codes: nearest codes, their statistics, and the prefix trie of code tuples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.reference.build_trie import TrieLevel
from ops.reference.build_trie import build_trie as _build_trie
from ops.reference.codebook_stats import codebook_stats as _codebook_stats
from ops.reference.residual_quantize import residual_quantize as _residual_quantize
from ops.reference.trie_topk_step import trie_topk_step as _trie_topk_step


def residual_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Nearest code of every level in turn, each level on what the levels before left over.

    Args:
        x: [B, D]; distances are computed in fp32, as |code|^2 - 2 x . code.
        codebooks: one [K_l, D] per level.

    Returns:
        codes [B, L] int64 (equal computed distances go to the lowest index; rounding may separate what is equal on
        paper) and the last residual [B, D].

    Raises:
        ValueError: if a codebook's width is not x's.
    """
    checks.check_rank("residual_quantize", "x", x, "B, D")
    for level, codebook in enumerate(codebooks):
        if codebook.dim() != 2 or codebook.shape[1] != x.shape[1]:
            raise ValueError(
                f"ops.residual_quantize expected codebooks[{level}] of shape [K, {x.shape[1]}], "
                f"got {checks.shape_of(codebook)}."
            )
    return _residual_quantize(x, codebooks)


def codebook_stats(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many rows each code got, and their sum.

    Args:
        x: [B, D].
        codes: [B] int64 in 0..num_codes-1.
        num_codes: K.

    Returns:
        counts [K] and sums [K, D].

    Raises:
        ValueError: if the shapes disagree.
    """
    checks.check_rank("codebook_stats", "x", x, "B, D")
    checks.check_index_dtype("codebook_stats", "codes", codes)
    if codes.shape != x.shape[:1]:
        raise ValueError(f"ops.codebook_stats expected codes [{len(x)}], got {checks.shape_of(codes)}.")
    return _codebook_stats(x, codes, num_codes)


def build_trie(codes: Tensor) -> tuple[list[TrieLevel], Tensor]:
    """Prefix trie of distinct code tuples as compressed sparse rows, in O(N log N).

    Args:
        codes: [N, L] int64, not negative; levels may have vocabularies of any size.

    Returns:
        one TrieLevel(row_ptr, codes) per level, its edges sorted by (parent node, code) so that edge e arrives at
        node e of the next depth; and leaf_rows [N] int64, the row of `codes` that each leaf, in code order, stands for.

    Raises:
        ValueError: on a wrong shape or dtype, or a negative code.
        InputError: if two rows are equal.
    """
    checks.check_rank("build_trie", "codes", codes, "N, L")
    checks.check_index_dtype("build_trie", "codes", codes)
    if codes.numel() == 0:
        raise ValueError(f"ops.build_trie expected at least one row and one level, got {checks.shape_of(codes)}.")
    if int(codes.min()) < 0:
        raise ValueError(f"ops.build_trie expected codes of at least 0, got the negative {int(codes.min())}.")
    return _build_trie(codes)


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    *,
    beam_width: int,
    node_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best children of each row's beams: one step of an exact beam search over a trie level.

    A child scores its beam's score plus its own log-softmax over all K codes, children or not, in fp32. Equal scores
    go to the lowest node number, that is, to the lowest code tuple.

    Args:
        logits: [B, W, K], floating point.
        nodes: [B, W] int64 trie nodes of the beams, ascending within a row; -1, at the end, is an empty beam.
        scores: [B, W] fp32.
        row_ptr: [M+1] int32, from the level's TrieLevel.
        edge_codes: [E] int32, from the level's TrieLevel; all below K.
        beam_width: children to keep per row.
        node_allowed: [E] or [B, E] bool; children flagged false are passed over.

    Returns:
        parents (slots of beams), codes and nodes [B, beam_width] int64 and scores [B, beam_width] fp32, ascending by
        node within a row; slots left over hold parent 0, code 0, node -1 and score -inf. Inference only.

    Raises:
        ValueError: on shapes or dtypes that disagree.
    """
    op = "trie_topk_step"
    checks.check_rank(op, "logits", logits, "B, W, K")
    checks.check_rank(op, "row_ptr", row_ptr, "M+1")
    checks.check_rank(op, "edge_codes", edge_codes, "E")
    checks.check_index_dtype(op, "nodes", nodes)
    if nodes.shape != logits.shape[:2] or scores.shape != logits.shape[:2] or scores.dtype != torch.float32:
        raise ValueError(
            f"ops.{op} expected nodes and fp32 scores {list(logits.shape[:2])} for logits {checks.shape_of(logits)}, "
            f"got nodes {checks.shape_of(nodes)} and scores {checks.shape_of(scores)}."
        )
    if row_ptr.dtype != torch.int32 or edge_codes.dtype != torch.int32:
        raise ValueError(
            f"ops.{op} expected int32 row_ptr and edge_codes, "
            f"got {checks.shape_of(row_ptr)} and {checks.shape_of(edge_codes)}."
        )
    if beam_width < 1:
        raise ValueError(f"ops.{op} expected beam_width of at least 1, got {beam_width}.")
    edges = list(edge_codes.shape)
    if node_allowed is not None and (
        node_allowed.dtype != torch.bool or list(node_allowed.shape) not in (edges, [len(logits), *edges])
    ):
        raise ValueError(
            f"ops.{op} expected node_allowed as bool {edges} or {[len(logits), *edges]}, "
            f"got {checks.shape_of(node_allowed)}."
        )
    return _trie_topk_step(logits, nodes, scores, row_ptr, edge_codes, beam_width, node_allowed)
