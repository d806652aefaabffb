"""Public ops on packed (jagged) tensors: one signature per op, checked here, computed by its twin in `ops/reference`.

Rows of a batch lie behind each other in [T, ...] tensors; `offsets` int32 [B+1] are their boundaries and `max_len` is a
Python int that no row exceeds. Rows may be empty. Under autocast, products take the autocast dtype; norms, softmax,
distances and losses compute in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.reference.add_rms_norm import add_rms_norm as _add_rms_norm
from ops.reference.beam_attention import beam_self_attention as _beam_self_attention
from ops.reference.build_trie import TrieLevel
from ops.reference.build_trie import build_trie as _build_trie
from ops.reference.codebook_stats import codebook_stats as _codebook_stats
from ops.reference.cross_entropy_small_vocab import cross_entropy_small_vocab as _cross_entropy_small_vocab
from ops.reference.dropout import dropout as _dropout
from ops.reference.jagged_attention import jagged_attention as _jagged_attention
from ops.reference.jagged_to_padded import jagged_to_padded as _jagged_to_padded
from ops.reference.jagged_to_padded import padded_to_jagged as _padded_to_jagged
from ops.reference.relative_buckets import relative_buckets
from ops.reference.relu_feed_forward import relu_feed_forward as _relu_feed_forward
from ops.reference.residual_quantize import residual_quantize as _residual_quantize
from ops.reference.semantic_id_embedding import semantic_id_embedding as _semantic_id_embedding
from ops.reference.trie_topk_step import trie_topk_step as _trie_topk_step

__all__ = [
    "TrieLevel",
    "add_rms_norm",
    "beam_cross_attention",
    "beam_self_attention",
    "build_trie",
    "codebook_stats",
    "cross_entropy_small_vocab",
    "dropout",
    "jagged_attention",
    "jagged_self_attention",
    "jagged_to_padded",
    "padded_to_jagged",
    "relative_buckets",
    "relu_feed_forward",
    "residual_quantize",
    "semantic_id_embedding",
    "trie_topk_step",
]


def _to_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on (float64 is left alone), else unchanged."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def jagged_to_padded(x: Tensor, offsets: Tensor, *, max_len: int, pad: float = 0.0) -> Tensor:
    """Packed rows as one padded block.

    Args:
        x: [T, ...] packed rows, any dtype.
        offsets: [B+1] int32.
        max_len: width of the block; no row may be longer.
        pad: value behind the end of each row.

    Returns:
        [B, max_len, ...].

    Raises:
        ValueError: on wrong offsets or a row longer than max_len.
    """
    checks.check_offsets("jagged_to_padded", "offsets", offsets, x.shape[0])
    checks.check_max_len("jagged_to_padded", "max_len", max_len, offsets)
    return _jagged_to_padded(x, offsets, max_len, pad)


def padded_to_jagged(x: Tensor, offsets: Tensor, *, num_tokens: int) -> Tensor:
    """The first positions of each padded row, packed; the inverse of `jagged_to_padded`.

    Args:
        x: [B, max_len, ...], any dtype.
        offsets: [B+1] int32.
        num_tokens: T, equal to offsets[-1].

    Returns:
        [T, ...].

    Raises:
        ValueError: on wrong offsets or a row longer than max_len.
    """
    checks.check_offsets("padded_to_jagged", "offsets", offsets, num_tokens)
    if x.dim() < 2 or len(x) != len(offsets) - 1:
        raise ValueError(
            f"ops.padded_to_jagged expected x of shape [{len(offsets) - 1}, max_len, ...], got {checks.shape_of(x)}."
        )
    checks.check_max_len("padded_to_jagged", "x.shape[1]", x.shape[1], offsets)
    return _padded_to_jagged(x, offsets, num_tokens)


def dropout(x: Tensor, *, dropout_p: float) -> Tensor:
    """Zero each element with probability `dropout_p` and scale the rest by 1 / (1 - dropout_p).

    The same as torch's dropout with a cheaper random mask; the probability is exact to 1/65536.

    Args:
        x: any shape, floating point.
        dropout_p: 0 switches it off, as in evaluation.

    Raises:
        ValueError: if dropout_p is outside [0, 1).
    """
    checks.check_dropout("dropout", dropout_p)
    return _dropout(x, dropout_p)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float = 1e-6, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Residual addition, dropout and T5's norm (Zhang and Sennrich 2019: no mean, no bias) in one op.

    Args:
        x: [T, D] output of a sub-layer, to which dropout applies.
        residual: [T, D], or None for zeros.
        weight: [D].
        eps: added to the mean square.
        dropout_p: 0 switches dropout off.

    Returns:
        (normed, residual + dropout(x)), both [T, D] in the wider of the two inputs' dtypes; statistics fp32.

    Raises:
        ValueError: if the shapes disagree or dropout_p is outside [0, 1).
    """
    checks.check_rank("add_rms_norm", "x", x, "T, D")
    if (residual is not None and residual.shape != x.shape) or weight.shape != x.shape[1:]:
        got = "None" if residual is None else checks.shape_of(residual)
        raise ValueError(
            f"ops.add_rms_norm expected residual of x's shape {checks.shape_of(x)} and weight [{x.shape[1]}], "
            f"got residual {got} and weight {checks.shape_of(weight)}."
        )
    checks.check_dropout("add_rms_norm", dropout_p)
    return _add_rms_norm(x, residual, weight, eps, dropout_p)


def relu_feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """dropout(relu(x @ w_in.T)) @ w_out.T, T5's feed-forward layer without biases.

    Args:
        x: [T, D].
        w_in: [F, D].
        w_out: [D, F].
        dropout_p: on the hidden layer; 0 switches it off.

    Returns:
        [T, D] in the autocast dtype, or x's.

    Raises:
        ValueError: if the shapes disagree or dropout_p is outside [0, 1).
    """
    checks.check_rank("relu_feed_forward", "x", x, "T, D")
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[1] or w_out.shape != w_in.shape[::-1]:
        raise ValueError(
            f"ops.relu_feed_forward expected w_in [F, {x.shape[1]}] and w_out [{x.shape[1]}, F] for x "
            f"{checks.shape_of(x)}, got {checks.shape_of(w_in)} and {checks.shape_of(w_out)}."
        )
    checks.check_dropout("relu_feed_forward", dropout_p)
    x, w_in, w_out = _to_autocast_dtype(x, w_in, w_out)
    return _relu_feed_forward(x, w_in, w_out, dropout_p)


def jagged_attention(
    q: Tensor,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    bias_table: Tensor | None = None,
    max_distance: int = 128,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T + relative bias) v within each row, queries and keys from different packed rows.

    Keys and values are one tensor, as a fused product makes them, so that their gradient is one too. Query i of a row
    and key j are at relative position j - i, which T5's two-sided buckets (Raffel et al. 2020, section 2.1) map to a
    row of `bias_table`. A query without keys gets zeros.

    Args:
        q: [Tq, H, D].
        kv: [Tk, 2, H, D] keys and values, in q's dtype.
        offsets_q: [B+1] int32.
        offsets_k: [B+1] int32.
        max_q: no row has more queries.
        max_k: no row has more keys.
        scale: factor of the products.
        bias_table: [num_buckets, H] or None; used in fp32.
        max_distance: distance from which on all positions share the last bucket.
        dropout_p: on the probabilities; 0 switches it off.

    Returns:
        [Tq, H, D] in the autocast dtype, or q's; scores and softmax are at least fp32.

    Raises:
        ValueError: on shapes, dtypes or offsets that disagree.
    """
    op = "jagged_attention"
    checks.check_rank(op, "q", q, "Tq, H, D")
    if kv.dim() != 4 or kv.shape[1:] != (2, *q.shape[1:]) or q.dtype != kv.dtype:
        raise ValueError(
            f"ops.{op} expected q [Tq, H, D] and kv [Tk, 2, H, D] of one dtype, "
            f"got {checks.shape_of(q)} and {checks.shape_of(kv)}."
        )
    if len(offsets_q) != len(offsets_k):
        raise ValueError(
            f"ops.{op} expected as many rows of q as of kv, got {len(offsets_q) - 1} and {len(offsets_k) - 1}."
        )
    _check_attention(op, bias_table, q.shape[1], dropout_p)
    checks.check_offsets(op, "offsets_q", offsets_q, len(q))
    checks.check_offsets(op, "offsets_k", offsets_k, len(kv))
    checks.check_max_len(op, "max_q", max_q, offsets_q)
    checks.check_max_len(op, "max_k", max_k, offsets_k)
    q, kv = _to_autocast_dtype(q, kv)
    return _jagged_attention(
        q, kv, offsets_q, offsets_k, max_q, max_k, scale, bias_table, max_distance, False, dropout_p
    )


def jagged_self_attention(
    qkv: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    scale: float,
    bias_table: Tensor | None = None,
    max_distance: int = 128,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """`jagged_attention` of packed rows over themselves, from one fused product.

    Args:
        qkv: [T, 3, H, D] queries, keys and values.
        offsets: [B+1] int32.
        max_len: no row is longer.
        scale: factor of the products.
        bias_table: [num_buckets, H] or None; used in fp32.
        max_distance: distance from which on all positions share the last bucket.
        causal: position i sees 0..i, and all buckets look back.
        dropout_p: on the probabilities; 0 switches it off.

    Returns:
        [T, H, D] in the autocast dtype, or qkv's; scores and softmax are at least fp32.

    Raises:
        ValueError: on shapes or offsets that disagree.
    """
    op = "jagged_self_attention"
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"ops.{op} expected qkv [T, 3, H, D], got {checks.shape_of(qkv)}.")
    _check_attention(op, bias_table, qkv.shape[2], dropout_p)
    checks.check_offsets(op, "offsets", offsets, len(qkv))
    checks.check_max_len(op, "max_len", max_len, offsets)
    (qkv,) = _to_autocast_dtype(qkv)
    return _jagged_attention(
        None, qkv, offsets, offsets, max_len, max_len, scale, bias_table, max_distance, causal, dropout_p
    )


def _check_attention(op: str, bias_table: Tensor | None, num_heads: int, dropout_p: float) -> None:
    if bias_table is not None and (bias_table.dim() != 2 or bias_table.shape[1] != num_heads):
        raise ValueError(f"ops.{op} expected bias_table [num_buckets, {num_heads}], got {checks.shape_of(bias_table)}.")
    checks.check_dropout(op, dropout_p)


def beam_cross_attention(q: Tensor, kv: Tensor, offsets_k: Tensor, *, max_k: int, scale: float) -> Tensor:
    """Cross attention of all beams of a row over that row's keys, which are read once and never repeated per beam.

    Args:
        q: [B, W, H, D].
        kv: [T, 2, H, D] keys and values.
        offsets_k: [B+1] int32.
        max_k: no row has more keys.
        scale: factor of the products.

    Returns:
        [B, W, H, D]; zeros where a row has no keys. Inference only.

    Raises:
        ValueError: on shapes, dtypes or offsets that disagree.
    """
    checks.check_rank("beam_cross_attention", "q", q, "B, W, H, D")
    num_rows, num_beams = q.shape[:2]
    offsets_q = torch.arange(num_rows + 1, dtype=torch.int32, device=q.device) * num_beams
    out = jagged_attention(q.flatten(0, 1), kv, offsets_q, offsets_k, max_q=num_beams, max_k=max_k, scale=scale)
    return out.view(q.shape)


def beam_self_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ancestors: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Self attention of each beam over its own ancestors, found by index in a cache that is never reordered.

    Args:
        q: [B, W, H, D] queries of the newest step.
        keys: one [B, W_s, H, D] per step, the newest last; W_s may differ.
        values: as keys.
        ancestors: [B, W, steps] int64, the beam's slot at every step.
        scale: factor of the products.
        bias: [H, steps] relative bias per step, or None.

    Returns:
        [B, W, H, D]. Inference only.

    Raises:
        ValueError: if the shapes disagree.
    """
    op = "beam_self_attention"
    checks.check_rank(op, "q", q, "B, W, H, D")
    checks.check_index_dtype(op, "ancestors", ancestors)
    if len(keys) != len(values) or ancestors.shape != (*q.shape[:2], len(keys)):
        raise ValueError(
            f"ops.{op} expected ancestors [{q.shape[0]}, {q.shape[1]}, {len(keys)}] for {len(keys)} cached keys, "
            f"got {checks.shape_of(ancestors)} and {len(values)} values."
        )
    return _beam_self_attention(q, keys, values, ancestors, scale, bias)


def cross_entropy_small_vocab(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each row, in fp32.

    Args:
        logits: [B, K].
        target: [B] int64 in 0..K-1 or ignore_index.
        ignore_index: rows with this target count 0.
        label_smoothing: share of the target that is spread evenly over all K classes.

    Returns:
        [B] fp32 (fp64 for fp64 logits), not averaged.

    Raises:
        ValueError: if the shapes disagree.
    """
    op = "cross_entropy_small_vocab"
    checks.check_rank(op, "logits", logits, "B, K")
    checks.check_index_dtype(op, "target", target)
    if target.shape != logits.shape[:1]:
        raise ValueError(f"ops.{op} expected target [{len(logits)}], got {checks.shape_of(target)}.")
    return _cross_entropy_small_vocab(logits, target, ignore_index, label_smoothing)


def semantic_id_embedding(codes: Tensor, table: Tensor, level_offsets: Tensor) -> Tensor:
    """Rows of the token table for the codes of each level: table[codes[:, l] + level_offsets[l]].

    Args:
        codes: [B, L] int64, counted from 0 in every level.
        table: [num_tokens, D].
        level_offsets: [L] int64, first token of each level.

    Returns:
        [B, L, D] in the table's dtype.

    Raises:
        ValueError: if the shapes disagree.
    """
    op = "semantic_id_embedding"
    checks.check_rank(op, "codes", codes, "B, L")
    checks.check_rank(op, "table", table, "num_tokens, D")
    checks.check_index_dtype(op, "codes", codes)
    if level_offsets.shape != codes.shape[1:]:
        raise ValueError(
            f"ops.{op} expected level_offsets [{codes.shape[1]}] for codes {checks.shape_of(codes)}, "
            f"got {checks.shape_of(level_offsets)}."
        )
    return _semantic_id_embedding(codes, table, level_offsets)


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
