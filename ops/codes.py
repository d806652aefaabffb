"""Ops on codes: nearest codes, their statistics, and the prefix trie of code tuples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.backend import say_once, uses_cpu_path, uses_triton
from ops.cpu.residual_quantize import residual_quantize as _residual_quantize_cpu
from ops.cpu.trie_topk_step import trie_topk_step as _trie_topk_step_cpu
from ops.reference.build_trie import TrieLevel
from ops.reference.build_trie import build_trie as _build_trie
from ops.reference.codebook_stats import codebook_stats as _codebook_stats
from ops.reference.leaf_filter import LeafFilter
from ops.reference.residual_quantize import residual_quantize as _residual_quantize
from ops.reference.trie_topk_step import trie_topk_step as _trie_topk_step

_PRECISIONS = ("ieee", "tf32x3")
_NORMALIZATIONS = ("level", "children", "none")
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
    if uses_cpu_path(x.device.type, None):
        return _residual_quantize_cpu(x, codebooks)
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
    """Prefix trie of code tuples as compressed sparse rows, in O(N log N).

    Where rows are equal, one more level ends the trie, whose "codes" are the numbers 0, 1, ... of a tuple's rows, in
    the order of the rows: a leaf is one row in any case.

    Args:
        codes: [N, L] int64, not negative, below 2^31; levels may have vocabularies of any size.

    Returns:
        one TrieLevel(row_ptr, codes) per level, its edges sorted by (parent node, code) so that edge e arrives at
        node e of the next depth; and leaf_rows [N] int32, the row of `codes` that each leaf, in code order, stands for.

    Raises:
        ValueError: on a wrong shape or dtype, or a code out of range.
    """
    checks.check_rank("build_trie", "codes", codes, "N, L")
    checks.check_index_dtype("build_trie", "codes", codes)
    if codes.numel() == 0:
        raise ValueError(f"ops.build_trie expected at least one row and one level, got {checks.shape_of(codes)}.")
    lowest, highest = (int(code) for code in codes.aminmax())
    if lowest < 0 or highest >= 1 << 31:
        wrong = f"the negative {lowest}" if lowest < 0 else highest
        raise ValueError(f"ops.build_trie expected codes of at least 0 and below 2^31, got {wrong}.")
    return _build_trie(codes)


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    *,
    beam_width: int,
    normalize: str = "level",
    leaf_filter: LeafFilter | None = None,
    leaf_begins: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best children of each row's beams: one step of an exact beam search over a trie level.

    A child scores its beam's score plus its own log-probability, in fp32. Equal scores go to the lowest node number,
    that is, to the lowest code tuple. A child whose score is NaN is passed over.

    Args:
        logits: [B, W, K], floating point.
        nodes: [B, W] int64 trie nodes of the beams, ascending within a row; -1, at the end, is an empty beam.
        scores: [B, W] fp32.
        row_ptr: [M+1] int32, from the level's TrieLevel.
        edge_codes: [E] int16 or int32, E at least 1, from the level's TrieLevel; all below K.
        beam_width: children to keep per row.
        normalize: what a log-softmax goes over: "level", all K codes, children or not; "children", the node's children
            in the trie, reachable or not, so that a filter changes no score; "none", nothing, logits count as they are.
        leaf_filter: of the B rows; a child is passed over unless the row may reach a leaf below it.
        leaf_begins: [E+1] int32; child e covers the leaves leaf_begins[e]..leaf_begins[e+1]-1, None if leaf e alone.

    Returns:
        parents (slots of beams), codes and nodes [B, beam_width] int64 and scores [B, beam_width] fp32, ascending by
        node within a row; slots left over hold parent 0, code 0, node -1 and score -inf. Inference only.

    Raises:
        ValueError: on shapes or dtypes that disagree, or an unknown normalisation.
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
    if row_ptr.dtype != torch.int32 or edge_codes.dtype not in (torch.int16, torch.int32):
        raise ValueError(
            f"ops.{op} expected int32 row_ptr and int16 or int32 edge_codes, "
            f"got {checks.shape_of(row_ptr)} and {checks.shape_of(edge_codes)}."
        )
    if beam_width < 1 or len(edge_codes) < 1:
        raise ValueError(
            f"ops.{op} expected beam_width and edges of at least 1, got {beam_width} and {len(edge_codes)}."
        )
    if normalize not in _NORMALIZATIONS:
        raise ValueError(f"ops.{op} expected normalize to be one of {', '.join(_NORMALIZATIONS)}, got {normalize!r}.")
    _check_leaf_filter(op, leaf_filter, leaf_begins, len(logits), len(edge_codes))
    checks.check_device(
        op,
        logits=logits,
        nodes=nodes,
        scores=scores,
        row_ptr=row_ptr,
        edge_codes=edge_codes,
        leaf_begins=leaf_begins,
        **{} if leaf_filter is None else {f"leaf_filter.{name}": part for name, part in leaf_filter._asdict().items()},
    )
    arguments = (logits, nodes, scores, row_ptr, edge_codes, beam_width, normalize, leaf_filter, leaf_begins)
    if uses_triton(logits.device.type):
        from ops.triton.trie_topk_step import supports
        from ops.triton.trie_topk_step import trie_topk_step as twin

        if supports(logits.shape[1], logits.shape[2], beam_width):
            return twin(*arguments)
        say_once(
            f"ops.{op} runs in PyTorch, slower and in more memory, for the best {beam_width} of "
            f"{list(logits.shape[1:])} logits per row: too many for its kernels."
        )
    if uses_cpu_path(logits.device.type, None):
        return _trie_topk_step_cpu(*arguments)
    return _trie_topk_step(*arguments)


def _check_leaf_filter(
    op: str, leaf_filter: LeafFilter | None, leaf_begins: Tensor | None, num_rows: int, num_edges: int
) -> None:
    """Raise on shapes or dtypes that disagree."""
    if leaf_begins is not None and (leaf_begins.dtype != torch.int32 or leaf_begins.shape != (num_edges + 1,)):
        raise ValueError(
            f"ops.{op} expected leaf_begins as int32 [{num_edges + 1}], got {checks.shape_of(leaf_begins)}."
        )
    if leaf_filter is None:
        return
    checks.check_offsets(op, "leaf_filter.offsets", leaf_filter.offsets, len(leaf_filter.leaves))
    expected = {"offsets": (num_rows + 1,), "only": (num_rows,)}
    for name, shape in expected.items():
        if getattr(leaf_filter, name).shape != shape:
            raise ValueError(
                f"ops.{op} expected leaf_filter.{name} of shape {list(shape)} for {num_rows} rows, "
                f"got {checks.shape_of(getattr(leaf_filter, name))}."
            )
    dtypes = {"leaves": torch.int32, "only": torch.bool, "allowed_before": torch.int32}
    for name, dtype in dtypes.items():
        part = getattr(leaf_filter, name)
        if part is not None and (part.dtype != dtype or part.dim() != 1):
            raise ValueError(
                f"ops.{op} expected leaf_filter.{name} of one dimension and {dtype}, got {checks.shape_of(part)}."
            )
