"""Ops on codes: nearest codes, their statistics, and the prefix trie of code tuples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.backend import say_once, uses_cpu_path, uses_triton
from ops.cpu.trie_topk_step import trie_topk_step as _trie_topk_step_cpu
from ops.reference.build_trie import TrieLevel
from ops.reference.build_trie import build_trie as _build_trie
from ops.reference.codebook_stats import codebook_stats as _codebook_stats
from ops.reference.residual_quantize import residual_quantize as _residual_quantize
from ops.reference.trie_topk_step import trie_topk_step as _trie_topk_step

_PRECISIONS = ("ieee", "tf32x3")
_WIDEST_ROW = 256
"""Beyond it the kernel's registers and shared memory do not suffice."""


def residual_quantize(x: Tensor, codebooks: Sequence[Tensor], *, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """Nearest code of every level in turn, each level on what the levels before left over; without gradient.

    Args:
        x: [B, D] floating point; distances are computed in fp32 (fp64 for fp64 x), as |code|^2 - 2 x . code. A row
            that holds NaN gets code 0 on every level.
        codebooks: one [K_l, D] per level.
        precision: of the products inside the kernel: "ieee" is exact fp32; "tf32x3" runs on tensor cores, with about
            the same error, and differs from it where two codes are almost equally near. Elsewhere all are exact.

    Returns:
        codes [B, L] int64 (equal computed distances go to the lowest index; rounding may separate what is equal on
        paper) and the last residual [B, D] in fp32, or fp64.

    Raises:
        ValueError: if x is not floating point, a codebook's width is not x's, a codebook is empty, or the precision
            is unknown.
    """
    op = "residual_quantize"
    checks.check_rank(op, "x", x, "B, D")
    if not x.is_floating_point() or len(codebooks) == 0:
        raise ValueError(
            f"ops.{op} expected floating-point x and one codebook per level, "
            f"got x {checks.shape_of(x)} and {len(codebooks)} codebooks."
        )
    for level, codebook in enumerate(codebooks):
        if codebook.dim() != 2 or codebook.shape[1] != x.shape[1] or codebook.shape[0] == 0:
            raise ValueError(
                f"ops.{op} expected codebooks[{level}] of shape [K, {x.shape[1]}] with K at least 1, "
                f"got {checks.shape_of(codebook)}."
            )
        checks.check_device(op, **{"x": x, f"codebooks[{level}]": codebook})
    if precision not in _PRECISIONS:
        raise ValueError(f"ops.{op} expected precision to be one of {', '.join(_PRECISIONS)}, got {precision!r}.")
    if _quantizes_in_triton(x):
        if x.shape[1] <= _WIDEST_ROW:
            from ops.triton.residual_quantize import residual_quantize as twin

            return twin(x, codebooks, precision)
        say_once(f"ops.{op} runs in PyTorch for rows wider than {_WIDEST_ROW}, which its kernel cannot hold.")
    return _residual_quantize(x, codebooks)


def codebook_stats(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many rows each code got, and their sum; without gradient.

    Args:
        x: [B, D] finite, floating point.
        codes: [B] int64 in 0..num_codes-1; on a GPU the kernel ignores rows with others.
        num_codes: K.

    Returns:
        counts [K] int64 and sums [K, D] in fp32 (fp64 for fp64 x); both are zero for a code without rows.

    Raises:
        ValueError: if the shapes disagree, x is not floating point, or a code is out of range (where values are read).
    """
    op = "codebook_stats"
    checks.check_rank(op, "x", x, "B, D")
    checks.check_index_dtype(op, "codes", codes)
    if codes.shape != x.shape[:1] or not x.is_floating_point() or num_codes < 1:
        raise ValueError(
            f"ops.{op} expected floating-point x, codes [{x.shape[0]}] and num_codes of at least 1, "
            f"got x {checks.shape_of(x)}, codes {checks.shape_of(codes)} and num_codes {num_codes}."
        )
    checks.check_device(op, x=x, codes=codes)
    checks.check_codes(op, "codes", codes, num_codes)
    if _quantizes_in_triton(x):
        from ops.triton.codebook_stats import codebook_stats as twin

        return twin(x, codes, num_codes)
    return _codebook_stats(x, codes, num_codes)


def _quantizes_in_triton(x: Tensor) -> bool:
    return uses_triton(x.device.type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


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
    go to the lowest node number, that is, to the lowest code tuple. A child whose score is NaN is passed over.

    Args:
        logits: [B, W, K], floating point.
        nodes: [B, W] int64 trie nodes of the beams, ascending within a row; -1, at the end, is an empty beam.
        scores: [B, W] fp32.
        row_ptr: [M+1] int32, from the level's TrieLevel.
        edge_codes: [E] int32, E at least 1, from the level's TrieLevel; all below K.
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
    if beam_width < 1 or len(edge_codes) < 1:
        raise ValueError(
            f"ops.{op} expected beam_width and edges of at least 1, got {beam_width} and {len(edge_codes)}."
        )
    edges = list(edge_codes.shape)
    if node_allowed is not None and (
        node_allowed.dtype != torch.bool or list(node_allowed.shape) not in (edges, [len(logits), *edges])
    ):
        raise ValueError(
            f"ops.{op} expected node_allowed as bool {edges} or {[len(logits), *edges]}, "
            f"got {checks.shape_of(node_allowed)}."
        )
    checks.check_device(
        op,
        logits=logits,
        nodes=nodes,
        scores=scores,
        row_ptr=row_ptr,
        edge_codes=edge_codes,
        node_allowed=node_allowed,
    )
    arguments = (logits, nodes, scores, row_ptr, edge_codes, beam_width, node_allowed)
    if uses_triton(logits.device.type):
        from ops.triton.trie_topk_step import supports
        from ops.triton.trie_topk_step import trie_topk_step as twin

        if supports(*logits.shape[1:]):
            return twin(*arguments)
        say_once(f"ops.{op} runs in PyTorch for {list(logits.shape[1:])} logits per row, too many for its kernel.")
    if uses_cpu_path(logits.device.type, None):
        return _trie_topk_step_cpu(*arguments)
    return _trie_topk_step(*arguments)
