"""Attention within packed rows, and of beams during generation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.backend import to_autocast_dtype, uses_cpu_path
from ops.cpu.jagged_attention import jagged_attention as _jagged_attention_cpu
from ops.reference.beam_attention import beam_self_attention as _beam_self_attention
from ops.reference.jagged_attention import jagged_attention as _jagged_attention


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
    seed: Tensor | None = None,
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
        seed: [1] int64 that fixes the mask, or None to draw one.

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
    q, kv = to_autocast_dtype(q, kv)
    return _attend(q, kv, offsets_q, offsets_k, max_q, max_k, scale, bias_table, max_distance, False, dropout_p, seed)


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
    seed: Tensor | None = None,
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
        seed: [1] int64 that fixes the mask, or None to draw one.

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
    (qkv,) = to_autocast_dtype(qkv)
    return _attend(
        None, qkv, offsets, offsets, max_len, max_len, scale, bias_table, max_distance, causal, dropout_p, seed
    )


def _attend(
    q: Tensor | None,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    bias_table: Tensor | None,
    max_distance: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The twin that runs; q None and kv [T, 3, H, D] is self attention."""
    shape = (offsets_q, offsets_k, max_q, max_k, scale, bias_table, max_distance, causal, dropout_p)
    if uses_cpu_path(kv.device.type, seed):
        return _jagged_attention_cpu(q, kv, *shape)
    return _jagged_attention(q, kv, *shape, seed)


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
