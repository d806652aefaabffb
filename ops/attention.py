"""Attention within packed rows, and of beams during generation."""

import torch
from torch import Tensor

from ops import checks
from ops.backend import say_once, to_autocast_dtype, uses_cpu_path, uses_triton
from ops.cpu.beam_attention import beam_cross_attention as _beam_cross_attention_cpu
from ops.cpu.beam_attention import beam_self_attention as _beam_self_attention_cpu
from ops.cpu.jagged_attention import jagged_attention as _jagged_attention_cpu
from ops.reference.beam_attention import beam_cross_attention as _beam_cross_attention
from ops.reference.beam_attention import beam_self_attention as _beam_self_attention
from ops.reference.jagged_attention import jagged_attention as _jagged_attention

_WIDEST_HEAD = 128
"""Beyond it the kernels would spill registers."""


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
        kv: [Tk, 2, H, D] keys and values, in q's dtype; may be one layer out of a tensor of several.
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
    _check_attention(op, kv, bias_table, max_distance, False, dropout_p)
    checks.check_device(op, q=q, kv=kv, offsets_q=offsets_q, offsets_k=offsets_k, bias_table=bias_table, seed=seed)
    checks.check_offsets(op, "offsets_q", offsets_q, len(q))
    checks.check_offsets(op, "offsets_k", offsets_k, len(kv))
    checks.check_max_len(op, "max_q", max_q, offsets_q)
    checks.check_max_len(op, "max_k", max_k, offsets_k)
    q, kv = to_autocast_dtype(q, kv)
    return _attend(
        op, q, kv, offsets_q, offsets_k, max_q, max_k, scale, bias_table, max_distance, False, dropout_p, seed
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
    _check_attention(op, qkv, bias_table, max_distance, causal, dropout_p)
    checks.check_device(op, qkv=qkv, offsets=offsets, bias_table=bias_table, seed=seed)
    checks.check_offsets(op, "offsets", offsets, len(qkv))
    checks.check_max_len(op, "max_len", max_len, offsets)
    (qkv,) = to_autocast_dtype(qkv)
    return _attend(
        op, None, qkv, offsets, offsets, max_len, max_len, scale, bias_table, max_distance, causal, dropout_p, seed
    )


def _attend(
    op: str,
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
    rest = (offsets_q, offsets_k, max_q, max_k, scale, bias_table, max_distance, causal, dropout_p)
    if heads_in_triton(op, kv):
        from ops.triton.jagged_attention import jagged_attention as twin

        return twin(q, kv, *rest, seed)
    if uses_cpu_path(kv.device.type, seed):
        return _jagged_attention_cpu(q, kv, *rest)
    return _jagged_attention(q, kv, *rest, seed)


def _check_attention(
    op: str, heads: Tensor, bias_table: Tensor | None, max_distance: int, causal: bool, dropout_p: float
) -> None:
    if not heads.is_floating_point():
        raise ValueError(f"ops.{op} expected floating-point heads, got {checks.shape_of(heads)}.")
    num_heads = heads.shape[2]
    if bias_table is not None and (bias_table.dim() != 2 or bias_table.shape[1] != num_heads):
        raise ValueError(f"ops.{op} expected bias_table [num_buckets, {num_heads}], got {checks.shape_of(bias_table)}.")
    if bias_table is not None:
        num_exact = len(bias_table) // (2 if causal else 4)
        if num_exact == 0 or max_distance <= num_exact:
            raise ValueError(
                f"ops.{op} expected at least {2 if causal else 4} buckets and max_distance above {num_exact}, the "
                f"number of distances with a bucket of their own, got {len(bias_table)} buckets and {max_distance}."
            )
    checks.check_dropout(op, dropout_p)


def beam_cross_attention(q: Tensor, kv: Tensor, offsets_k: Tensor, *, max_k: int, scale: float) -> Tensor:
    """Cross attention of all beams of a row over that row's keys, which are read once and never repeated per beam.

    Args:
        q: [B, W, H, D].
        kv: [T, 2, H, D] keys and values, in q's dtype; may be one layer out of a tensor of several.
        offsets_k: [B+1] int32.
        max_k: no row has more keys.
        scale: factor of the products.

    Returns:
        [B, W, H, D] in the autocast dtype, or q's; zeros where a row has no keys. Scores and softmax are at least
        fp32. Inference only.

    Raises:
        ValueError: on shapes, dtypes or offsets that disagree.
    """
    op = "beam_cross_attention"
    checks.check_rank(op, "q", q, "B, W, H, D")
    if kv.dim() != 4 or kv.shape[1:] != (2, *q.shape[2:]) or q.dtype != kv.dtype:
        raise ValueError(
            f"ops.{op} expected q [B, W, H, D] and kv [T, 2, H, D] of one dtype, "
            f"got {checks.shape_of(q)} and {checks.shape_of(kv)}."
        )
    checks.check_device(op, q=q, kv=kv, offsets_k=offsets_k)
    checks.check_offsets(op, "offsets_k", offsets_k, len(kv))
    if len(offsets_k) != len(q) + 1:
        raise ValueError(f"ops.{op} expected offsets_k of the {len(q)} rows of q, got {len(offsets_k) - 1} rows.")
    checks.check_max_len(op, "max_k", max_k, offsets_k)
    q, kv = to_autocast_dtype(q, kv)
    if heads_in_triton(op, q):
        from ops.triton.beam_attention import beam_cross_attention as twin

        return twin(q, kv, offsets_k, max_k, scale)
    if uses_cpu_path(q.device.type, None):
        return _beam_cross_attention_cpu(q, kv, offsets_k, max_k, scale)
    return _beam_cross_attention(q, kv, offsets_k, max_k, scale)


def beam_self_attention(
    q: Tensor, cache: Tensor, ancestors: Tensor, *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Self attention of each beam over its own ancestors, found by index in a cache that is never reordered.

    Args:
        q: [B, W, H, D] queries of the newest step.
        cache: [S, B, slots, 2, H, D] keys and values of every step's beams in q's dtype; what lies in slots that no
            beam descends from, or in steps that `ancestors` does not have yet, is not read.
        ancestors: [B, W, steps] int64, the beam's slot at every step from the first to the newest.
        scale: factor of the products.
        bias: [H, steps] relative bias per step, or None.

    Returns:
        [B, W, H, D] in q's dtype; arithmetic is at least fp32. Inference only.

    Raises:
        ValueError: if shapes or dtypes disagree, or a slot does not exist (where values are read).
    """
    op = "beam_self_attention"
    checks.check_rank(op, "q", q, "B, W, H, D")
    checks.check_rank(op, "cache", cache, "S, B, slots, 2, H, D")
    checks.check_rank(op, "ancestors", ancestors, "B, W, steps")
    checks.check_index_dtype(op, "ancestors", ancestors)
    num_steps = ancestors.shape[2]
    if (cache.shape[1], *cache.shape[3:]) != (len(q), 2, *q.shape[2:]) or cache.dtype != q.dtype:
        raise ValueError(
            f"ops.{op} expected cache [S, {len(q)}, slots, 2, {q.shape[2]}, {q.shape[3]}] of q's dtype for q "
            f"{checks.shape_of(q)}, got {checks.shape_of(cache)}."
        )
    if ancestors.shape[:2] != q.shape[:2] or not 1 <= num_steps <= len(cache):
        raise ValueError(
            f"ops.{op} expected ancestors [{q.shape[0]}, {q.shape[1]}, 1 to {len(cache)} steps], "
            f"got {checks.shape_of(ancestors)}."
        )
    if bias is not None and bias.shape != (q.shape[2], num_steps):
        raise ValueError(f"ops.{op} expected bias [{q.shape[2]}, {num_steps}], got {checks.shape_of(bias)}.")
    checks.check_device(op, q=q, cache=cache, ancestors=ancestors, bias=bias)
    checks.check_index_range(op, "ancestors", ancestors, cache.shape[2])
    if heads_in_triton(op, q):
        from ops.triton.beam_attention import beam_self_attention as twin

        return twin(q, cache, ancestors, scale, bias)
    if uses_cpu_path(q.device.type, None):
        return _beam_self_attention_cpu(q, cache, ancestors, scale, bias)
    return _beam_self_attention(q, cache, ancestors, scale, bias)


def heads_in_triton(op: str, *heads: Tensor) -> bool:
    """Whether kernels take heads [..., D] of one dtype."""
    dtype, width = heads[0].dtype, max(part.shape[-1] for part in heads)
    if not uses_triton(heads[0].device.type) or dtype == torch.float64:
        return False
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and width <= _WIDEST_HEAD:
        return True
    say_once(
        f"ops.{op} runs in PyTorch for {dtype} heads of width {width}: its kernel takes fp32, fp16 and bf16 "
        f"up to width {_WIDEST_HEAD}."
    )
    return False
