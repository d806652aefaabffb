"""Attention within packed rows, forward and backward, without padding, atomics or [T, T] buffers in memory.

A tile is a block of queries against a block of keys of one row and head. The forward keeps the log of each query's
softmax denominator; the backward computes the probabilities from it again, once for the gradient of the queries, once
for that of keys and values, and once for that of the relative bias, each summed by the program that owns it.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.reference.relative_buckets import position_buckets
from ops.seeds import next_seed
from ops.triton.attention_tiles import (
    bounds_of_row,
    load_tile,
    rounded,
    slots_for,
    store_tile,
    tile_sizes,
    with_dense_heads,
)
from ops.triton.library import define
from ops.triton.packed import clear_tail
from ops.triton.parts import cdiv, dot, keep_mask, power_of_2, threshold_of, wide


@triton.jit
def _scores(
    q, k, bias_ptr, places_q, places_k, count_q, count_k, max_q, scale, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """[BLOCK_Q, BLOCK_K] fp32, -inf where there is no key to see."""
    scores = dot(q, tl.trans(k)) * scale
    visible = (places_k < count_k)[None, :]
    if CAUSAL:
        visible = visible & (places_k[None, :] <= places_q[:, None])
    if HAS_BIAS:
        exists = visible & (places_q < count_q)[:, None]
        position = places_k[None, :] - places_q[:, None] + (max_q - 1)
        scores += tl.load(bias_ptr + position, mask=exists, other=0.0)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _keep(
    seed_ptr, begin_q, places_q, first_k, head, threshold,
    DROPOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, BLOCK_K] dropout mask; rows are packed queries, columns the keys' places in the row."""
    if DROPOUT:
        return keep_mask(seed_ptr, begin_q + places_q, first_k, head, threshold, BLOCK_Q, BLOCK_K)
    else:
        return True


@triton.jit
def _grad_scores(probabilities, keep, grad_out, v, delta, factor, DROPOUT: tl.constexpr):
    """[BLOCK_Q, BLOCK_K] fp32. Queries that do not exist add nothing, since their `grad_out` is zero."""
    grad = dot(grad_out, tl.trans(v))
    if DROPOUT:
        grad = tl.where(keep, grad * factor, 0.0)
    return probabilities * (grad - delta[:, None])


@triton.jit
def _jagged_attention_fwd_kernel(
    q_ptr,  # [Tq, H, D], tokens q_stride apart
    kv_ptr,  # [Tk, 2, H, D], tokens kv_stride and the two kv_slot_stride apart
    offsets_q_ptr,  # [B+1] int32
    offsets_k_ptr,  # [B+1] int32
    bias_ptr,  # [H, max_q + max_k - 1] fp32 by relative position; read only if HAS_BIAS
    seed_ptr,  # [1] int64; read only if DROPOUT
    out_ptr,  # [Tq, H, D] out
    lse_ptr,  # [H, Tq] fp32 out, log of the sum of exponentiated scores; 0 without keys
    num_q,
    num_rows,
    num_heads,
    q_stride,
    kv_stride,
    kv_slot_stride,
    max_q,
    max_k,
    scale,
    threshold,
    factor,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    out_stride = num_heads * HEAD_DIM
    clear_tail(out_ptr, offsets_q_ptr, num_rows, num_q, out_stride, BLOCK_Q * WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_q = tl.program_id(1) * BLOCK_Q
    if row >= num_rows:
        return
    begin_q, count_q = bounds_of_row(offsets_q_ptr, row, max_q)
    if first_q >= count_q:
        return
    begin_k, count_k = bounds_of_row(offsets_k_ptr, row, max_k)
    k_ptr = kv_ptr + head * HEAD_DIM
    bias_ptr += head.to(tl.int64) * (max_q + max_k - 1)
    places_q = first_q + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head * HEAD_DIM, begin_q, places_q, count_q, q_stride, HEAD_DIM, WIDTH)
    out = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    last_k = count_k
    if CAUSAL:
        last_k = tl.minimum(count_k, first_q + BLOCK_Q)
    for first_k in range(0, last_k, BLOCK_K):
        places_k = first_k + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
        scores = _scores(q, k, bias_ptr, places_q, places_k, count_q, count_k, max_q, scale, HAS_BIAS, CAUSAL)
        # Every query sees the first key of the first tile, so that the largest score is finite from then on.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = keep_mask(seed_ptr, begin_q + places_q, first_k, head, threshold, BLOCK_Q, BLOCK_K)
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(k_ptr + kv_slot_stride, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
        out = out * shrink[:, None] + dot(weights.to(v.dtype), v)
        largest = new_largest
    sees_keys = total > 0.0
    safe_total = tl.where(sees_keys, total, 1.0)
    out = out * (factor / safe_total)[:, None]
    store_tile(out_ptr + head * HEAD_DIM, out, begin_q, places_q, count_q, out_stride, HEAD_DIM, WIDTH)
    lse = tl.where(sees_keys, largest + tl.log(safe_total), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * num_q + begin_q + places_q, lse, mask=places_q < count_q)


@triton.jit
def _jagged_attention_bwd_q_kernel(
    q_ptr,  # [Tq, H, D], tokens q_stride apart
    kv_ptr,  # [Tk, 2, H, D], tokens kv_stride and the two kv_slot_stride apart
    out_ptr,  # [Tq, H, D]
    grad_out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32
    offsets_q_ptr,  # [B+1] int32
    offsets_k_ptr,  # [B+1] int32
    bias_ptr,  # [H, max_q + max_k - 1] fp32; read only if HAS_BIAS
    seed_ptr,  # [1] int64; read only if DROPOUT
    grad_q_ptr,  # [Tq, H, D] out, tokens grad_q_stride apart; what lies between them is cleared in the tail, too
    delta_ptr,  # [H, Tq] fp32 out, product of output and its gradient
    num_q,
    num_rows,
    num_heads,
    q_stride,
    kv_stride,
    kv_slot_stride,
    grad_q_stride,
    max_q,
    max_k,
    scale,
    threshold,
    factor,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    out_stride = num_heads * HEAD_DIM
    clear_tail(grad_q_ptr, offsets_q_ptr, num_rows, num_q, grad_q_stride, BLOCK_Q * WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_q = tl.program_id(1) * BLOCK_Q
    if row >= num_rows:
        return
    begin_q, count_q = bounds_of_row(offsets_q_ptr, row, max_q)
    if first_q >= count_q:
        return
    begin_k, count_k = bounds_of_row(offsets_k_ptr, row, max_k)
    k_ptr = kv_ptr + head * HEAD_DIM
    bias_ptr += head.to(tl.int64) * (max_q + max_k - 1)
    places_q = first_q + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head * HEAD_DIM, begin_q, places_q, count_q, q_stride, HEAD_DIM, WIDTH)
    out = load_tile(out_ptr + head * HEAD_DIM, begin_q, places_q, count_q, out_stride, HEAD_DIM, WIDTH)
    grad_out = load_tile(grad_out_ptr + head * HEAD_DIM, begin_q, places_q, count_q, out_stride, HEAD_DIM, WIDTH)
    delta = tl.sum(wide(out) * wide(grad_out), 1)
    at = head.to(tl.int64) * num_q + begin_q + places_q
    tl.store(delta_ptr + at, delta, mask=places_q < count_q)
    lse = tl.load(lse_ptr + at, mask=places_q < count_q, other=0.0)
    grad_q = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    last_k = count_k
    if CAUSAL:
        last_k = tl.minimum(count_k, first_q + BLOCK_Q)
    for first_k in range(0, last_k, BLOCK_K):
        places_k = first_k + tl.arange(0, BLOCK_K)
        k = load_tile(k_ptr, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
        v = load_tile(k_ptr + kv_slot_stride, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
        scores = _scores(q, k, bias_ptr, places_q, places_k, count_q, count_k, max_q, scale, HAS_BIAS, CAUSAL)
        probabilities = tl.exp(scores - lse[:, None])
        keep = _keep(seed_ptr, begin_q, places_q, first_k, head, threshold, DROPOUT, BLOCK_Q, BLOCK_K)
        grad_scores = _grad_scores(probabilities, keep, grad_out, v, delta, factor, DROPOUT)
        grad_q += dot(grad_scores.to(k.dtype), k)
    grad_q *= scale
    store_tile(grad_q_ptr + head * HEAD_DIM, grad_q, begin_q, places_q, count_q, grad_q_stride, HEAD_DIM, WIDTH)


@triton.jit
def _jagged_attention_bwd_kv_kernel(
    q_ptr,  # [Tq, H, D], tokens q_stride apart
    kv_ptr,  # [Tk, 2, H, D], tokens kv_stride and the two kv_slot_stride apart
    grad_out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32
    delta_ptr,  # [H, Tq] fp32
    offsets_q_ptr,  # [B+1] int32
    offsets_k_ptr,  # [B+1] int32
    bias_ptr,  # [H, max_q + max_k - 1] fp32; read only if HAS_BIAS
    seed_ptr,  # [1] int64; read only if DROPOUT
    grad_kv_ptr,  # [Tk, 2, H, D] out, tokens grad_kv_stride apart
    num_q,
    num_k,
    num_rows,
    num_heads,
    q_stride,
    kv_stride,
    kv_slot_stride,
    grad_kv_stride,
    max_q,
    max_k,
    scale,
    threshold,
    factor,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    CLEAR_TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    out_stride = num_heads * HEAD_DIM
    if CLEAR_TAIL:
        clear_tail(grad_kv_ptr, offsets_k_ptr, num_rows, num_k, grad_kv_stride, BLOCK_K * WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_k = tl.program_id(1) * BLOCK_K
    if row >= num_rows:
        return
    begin_k, count_k = bounds_of_row(offsets_k_ptr, row, max_k)
    if first_k >= count_k:
        return
    begin_q, count_q = bounds_of_row(offsets_q_ptr, row, max_q)
    bias_ptr += head.to(tl.int64) * (max_q + max_k - 1)
    lse_ptr += head.to(tl.int64) * num_q
    delta_ptr += head.to(tl.int64) * num_q
    k_ptr = kv_ptr + head * HEAD_DIM
    places_k = first_k + tl.arange(0, BLOCK_K)
    k = load_tile(k_ptr, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
    v = load_tile(k_ptr + kv_slot_stride, begin_k, places_k, count_k, kv_stride, HEAD_DIM, WIDTH)
    grad_k = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    begin = 0
    if CAUSAL:
        begin = first_k // BLOCK_Q * BLOCK_Q
    for first_q in range(begin, count_q, BLOCK_Q):
        places_q = first_q + tl.arange(0, BLOCK_Q)
        q = load_tile(q_ptr + head * HEAD_DIM, begin_q, places_q, count_q, q_stride, HEAD_DIM, WIDTH)
        grad_out = load_tile(grad_out_ptr + head * HEAD_DIM, begin_q, places_q, count_q, out_stride, HEAD_DIM, WIDTH)
        lse = tl.load(lse_ptr + begin_q + places_q, mask=places_q < count_q, other=0.0)
        delta = tl.load(delta_ptr + begin_q + places_q, mask=places_q < count_q, other=0.0)
        scores = _scores(q, k, bias_ptr, places_q, places_k, count_q, count_k, max_q, scale, HAS_BIAS, CAUSAL)
        probabilities = tl.exp(scores - lse[:, None])
        keep = _keep(seed_ptr, begin_q, places_q, first_k, head, threshold, DROPOUT, BLOCK_Q, BLOCK_K)
        kept = tl.where(keep, probabilities, 0.0)
        grad_v += dot(tl.trans(kept.to(grad_out.dtype)), grad_out)
        grad_scores = _grad_scores(probabilities, keep, grad_out, v, delta, factor, DROPOUT)
        grad_k += dot(tl.trans(grad_scores.to(q.dtype)), q)
    grad_k *= scale
    grad_v *= factor
    grad_k_ptr = grad_kv_ptr + head * HEAD_DIM
    store_tile(grad_k_ptr, grad_k, begin_k, places_k, count_k, grad_kv_stride, HEAD_DIM, WIDTH)
    store_tile(grad_k_ptr + out_stride, grad_v, begin_k, places_k, count_k, grad_kv_stride, HEAD_DIM, WIDTH)


@triton.jit
def _jagged_attention_bwd_bias_kernel(
    q_ptr,  # [Tq, H, D], tokens q_stride apart
    kv_ptr,  # [Tk, 2, H, D], tokens kv_stride and the two kv_slot_stride apart
    grad_out_ptr,  # [Tq, H, D]
    lse_ptr,  # [H, Tq] fp32
    delta_ptr,  # [H, Tq] fp32
    offsets_q_ptr,  # [B+1] int32
    offsets_k_ptr,  # [B+1] int32
    bias_ptr,  # [H, max_q + max_k - 1] fp32
    seed_ptr,  # [1] int64; read only if DROPOUT
    partial_ptr,  # [slots, H, diagonals, 2 * BLOCK] fp32 out
    num_q,
    num_rows,
    q_stride,
    kv_stride,
    kv_slot_stride,
    max_q,
    max_k,
    scale,
    threshold,
    factor,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums the tiles of one diagonal, key tile minus query tile, over a slot's share of the rows.

    Places on one diagonal of the sum have one relative position. The sum's row m is rotated left by m, so that column r
    holds the relative positions r, from the unrotated part, and r - BLOCK, counted from the tiles' shift.
    """
    slot, diagonal, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(2)
    out_stride = num_heads * HEAD_DIM
    shift = diagonal - (tl.cdiv(max_q, BLOCK) - 1)
    q_ptr += head * HEAD_DIM
    k_ptr = kv_ptr + head * HEAD_DIM
    grad_out_ptr += head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * num_q
    delta_ptr += head.to(tl.int64) * num_q
    bias_ptr += head.to(tl.int64) * (max_q + max_k - 1)
    inside = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for row in range(slot, num_rows, tl.num_programs(0)):
        begin_q, count_q = bounds_of_row(offsets_q_ptr, row, max_q)
        begin_k, count_k = bounds_of_row(offsets_k_ptr, row, max_k)
        last_tile = tl.minimum(tl.cdiv(count_q, BLOCK), tl.cdiv(count_k, BLOCK) - shift)
        for tile in range(tl.maximum(0, -shift), last_tile):
            places_q = tile * BLOCK + inside
            first_k = (tile + shift) * BLOCK
            q = load_tile(q_ptr, begin_q, places_q, count_q, q_stride, HEAD_DIM, WIDTH)
            grad_out = load_tile(grad_out_ptr, begin_q, places_q, count_q, out_stride, HEAD_DIM, WIDTH)
            lse = tl.load(lse_ptr + begin_q + places_q, mask=places_q < count_q, other=0.0)
            delta = tl.load(delta_ptr + begin_q + places_q, mask=places_q < count_q, other=0.0)
            k = load_tile(k_ptr, begin_k, first_k + inside, count_k, kv_stride, HEAD_DIM, WIDTH)
            v = load_tile(k_ptr + kv_slot_stride, begin_k, first_k + inside, count_k, kv_stride, HEAD_DIM, WIDTH)
            scores = _scores(
                q, k, bias_ptr, places_q, first_k + inside, count_q, count_k, max_q, scale, True, CAUSAL
            )  # fmt: skip
            probabilities = tl.exp(scores - lse[:, None])
            keep = _keep(seed_ptr, begin_q, places_q, first_k, head, threshold, DROPOUT, BLOCK, BLOCK)
            total += _grad_scores(probabilities, keep, grad_out, v, delta, factor, DROPOUT)
    column = inside[:, None] + inside[None, :]
    rotated = tl.gather(total, column % BLOCK, 1)
    partial_ptr += ((slot * num_heads + head) * tl.num_programs(1) + diagonal).to(tl.int64) * (2 * BLOCK)
    tl.store(partial_ptr + inside, tl.sum(tl.where(column < BLOCK, rotated, 0.0), 0))
    tl.store(partial_ptr + BLOCK + inside, tl.sum(tl.where(column < BLOCK, 0.0, rotated), 0))


@triton.jit
def _jagged_attention_bwd_bucket_kernel(
    partial_ptr,  # [slots, H, diagonals, 2 * BLOCK] fp32
    bounds_ptr,  # [num_buckets, 2] int32: a bucket's first position and the one behind its last, from -max_q + 1 on
    grad_table_ptr,  # [num_buckets, H] fp32 out
    num_slots,
    num_diagonals,
    max_q,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Sums a bucket's relative positions, of which each lies in two neighbouring diagonals, over the slots."""
    bucket, head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    first, last = tl.load(bounds_ptr + 2 * bucket), tl.load(bounds_ptr + 2 * bucket + 1)
    num_tiles = tl.cdiv(max_q, BLOCK)
    total = tl.zeros([SLOTS, POSITIONS], tl.float32)
    for begin in range(first, last, POSITIONS):
        position = begin + tl.arange(0, POSITIONS)
        # Shifted to be positive, for which rounding down is one thing: -max_q + 1 lies above -num_tiles * BLOCK.
        relative = position - (max_q - 1) + num_tiles * BLOCK
        diagonal, place = relative // BLOCK - 1, relative % BLOCK
        low = (position < last) & (diagonal >= 0) & (diagonal < num_diagonals)
        high = (position < last) & (diagonal + 1 < num_diagonals)
        for first_slot in range(0, num_slots, SLOTS):
            slots = first_slot + tl.arange(0, SLOTS)
            at = ((slots * num_heads + head) * num_diagonals).to(tl.int64)[:, None] + diagonal[None, :]
            at = at * (2 * BLOCK) + place[None, :]
            exists = (slots < num_slots)[:, None]
            total += tl.load(partial_ptr + at, mask=exists & low[None, :], other=0.0)
            total += tl.load(partial_ptr + at + 3 * BLOCK, mask=exists & high[None, :], other=0.0)
    tl.store(grad_table_ptr + bucket * num_heads + head, tl.sum(tl.sum(total, 1), 0))


def _blocks(max_q: int, max_k: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of tiles and heads."""
    return {"HEAD_DIM": head_dim, "WIDTH": power_of_2(head_dim), **tile_sizes(max_q, max_k, head_dim, dtype)}


@functools.cache
def _bucket_bounds(
    max_q: int, max_k: int, num_buckets: int, max_distance: int, causal: bool, device: torch.device
) -> Tensor:
    """[num_buckets, 2] int32 bounds of every bucket's relative positions; never forgotten, as the buckets are not."""
    buckets = position_buckets(max_q, max_k, num_buckets, max_distance, causal)
    bounds = torch.zeros(num_buckets, 2, dtype=torch.int32)
    for bucket in range(num_buckets):
        (places,) = torch.nonzero(buckets == bucket, as_tuple=True)
        if len(places):
            bounds[bucket, 0], bounds[bucket, 1] = places[0], places[-1] + 1
    return bounds.to(device)


def _split(q: Tensor | None, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Views of queries [Tq, H, D] and of keys and values [Tk, 2, H, D]."""
    return (kv[:, 0], kv[:, 1:]) if q is None else (q, kv)


def _forward(
    q: Tensor | None,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    bias_table: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k = rounded(max_q), rounded(max_k)
    q, kv = _split(q, kv)
    num_q, num_heads, head_dim = q.shape
    num_rows = len(offsets_q) - 1
    out = q.new_empty(q.shape)
    lse = q.new_empty(num_heads, num_q, dtype=torch.float32)
    if bias_table is None:
        bias = lse.new_empty(0)
    else:
        buckets = position_buckets(max_q, max_k, len(bias_table), max_distance, causal, q.device)
        bias = bias_table.float().t().index_select(1, buckets)
    blocks = _blocks(max_q, max_k, head_dim, q.dtype)
    num_stages = 2 if max_k > 2 * blocks["BLOCK_K"] else 1
    _jagged_attention_fwd_kernel[(max(1, num_rows * num_heads), cdiv(max_q, blocks["BLOCK_Q"]))](
        q, kv, offsets_q, offsets_k, bias, lse if seed is None else seed, out, lse,
        num_q, num_rows, num_heads, q.stride(0), kv.stride(0), kv.stride(1), max_q, max_k,
        scale, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p),
        HAS_BIAS=bias_table is not None, CAUSAL=causal, DROPOUT=seed is not None,
        num_stages=num_stages, **blocks,
    )  # fmt: skip
    return out, lse, bias


def _fake_forward(
    q: Tensor | None,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    bias_table: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, _ = _split(q, kv)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = (0,) if bias_table is None else (q.shape[1], rounded(max_q) + rounded(max_k) - 1)
    return q.new_empty(q.shape), lse, lse.new_empty(shape)


def _backward(
    grad_out: Tensor,
    q: Tensor | None,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    max_distance: int,
    causal: bool,
    dropout_p: float,
    num_buckets: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _fake_backward(
        grad_out, q, kv, out, lse, offsets_q, offsets_k, bias, seed,
        max_q, max_k, scale, max_distance, causal, dropout_p, num_buckets,
    )  # fmt: skip
    grad_q, grad_kv = _split(None if q is None else grads[0], grads[1])
    is_self = q is None
    q, kv = _split(q, kv)
    max_q, max_k = rounded(max_q), rounded(max_k)
    num_q, num_heads, head_dim = q.shape
    num_rows = len(offsets_q) - 1
    delta = torch.empty_like(lse)
    seed_or_any = lse if seed is None else seed
    strides = (q.stride(0), kv.stride(0), kv.stride(1))
    sizes = (max_q, max_k, scale, threshold_of(dropout_p), 1.0 / (1.0 - dropout_p))
    switches = {"HAS_BIAS": bias.numel() > 0, "CAUSAL": causal, "DROPOUT": seed is not None}
    blocks = _blocks(max_q, max_k, head_dim, q.dtype) | {"num_stages": 1}
    num_row_heads = max(1, num_rows * num_heads)
    _jagged_attention_bwd_q_kernel[(num_row_heads, cdiv(max_q, blocks["BLOCK_Q"]))](
        q, kv, out, grad_out, lse, offsets_q, offsets_k, bias, seed_or_any, grad_q, delta,
        num_q, num_rows, num_heads, *strides, grad_q.stride(0), *sizes, **switches, **blocks,
    )  # fmt: skip
    _jagged_attention_bwd_kv_kernel[(num_row_heads, cdiv(max_k, blocks["BLOCK_K"]))](
        q, kv, grad_out, lse, delta, offsets_q, offsets_k, bias, seed_or_any, grad_kv,
        num_q, len(kv), num_rows, num_heads, *strides, grad_kv.stride(0), *sizes,
        **switches, CLEAR_TAIL=not is_self, **blocks,
    )  # fmt: skip
    if num_buckets:
        block = max(blocks["BLOCK_Q"], blocks["BLOCK_K"])
        num_diagonals = cdiv(max_q, block) + (0 if causal else cdiv(max_k, block) - 1)
        slots = slots_for(num_rows, num_heads * num_diagonals * 2 * block)
        partials = lse.new_empty(slots, num_heads, num_diagonals, 2 * block)
        _jagged_attention_bwd_bias_kernel[(slots, num_diagonals, num_heads)](
            q, kv, grad_out, lse, delta, offsets_q, offsets_k, bias, seed_or_any, partials,
            num_q, num_rows, *strides, *sizes, CAUSAL=causal, DROPOUT=seed is not None,
            HEAD_DIM=head_dim, BLOCK=block, WIDTH=blocks["WIDTH"],
            num_warps=blocks["num_warps"], num_stages=1,
        )  # fmt: skip
        bounds = _bucket_bounds(max_q, max_k, num_buckets, max_distance, causal, q.device)
        _jagged_attention_bwd_bucket_kernel[(num_buckets, num_heads)](
            partials, bounds, grads[2], slots, num_diagonals, max_q,
            BLOCK=block, SLOTS=16, POSITIONS=32, num_warps=4,
        )  # fmt: skip
    return grads


def _fake_backward(
    grad_out: Tensor,
    q: Tensor | None,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    max_distance: int,
    causal: bool,
    dropout_p: float,
    num_buckets: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = kv.new_empty(0 if q is None else q.shape)
    return grad_q, kv.new_empty(kv.shape), lse.new_empty(num_buckets, kv.shape[2])


FORWARD = define(
    "jagged_attention(Tensor? q, Tensor kv, Tensor offsets_q, Tensor offsets_k, Tensor? bias_table, Tensor? seed, "
    "SymInt max_q, SymInt max_k, float scale, int max_distance, bool causal, float dropout_p) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "jagged_attention_backward(Tensor grad_out, Tensor? q, Tensor kv, Tensor out, Tensor lse, Tensor offsets_q, "
    "Tensor offsets_k, Tensor bias, Tensor? seed, SymInt max_q, SymInt max_k, float scale, int max_distance, "
    "bool causal, float dropout_p, SymInt num_buckets) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _JaggedAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        kv: Tensor,
        bias_table: Tensor | None,
        offsets_q: Tensor | None,
        offsets_k: Tensor,
        seed: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        max_distance: int,
        causal: bool,
        dropout_p: float,
    ) -> Tensor:
        offsets_q = offsets_k if offsets_q is None else offsets_q
        ctx.settings = (max_q, max_k, scale, max_distance, causal, dropout_p)
        out, lse, bias = FORWARD(q, kv, offsets_q, offsets_k, bias_table, seed, *ctx.settings)
        ctx.save_for_backward(q, kv, out, lse, offsets_q, offsets_k, bias, seed)
        ctx.num_buckets = 0 if bias_table is None else len(bias_table)
        ctx.bias_dtype = None if bias_table is None else bias_table.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_q, needs_kv, needs_bias = ctx.needs_input_grad[:3]
        num_buckets = ctx.num_buckets if needs_bias else 0
        grad_q, grad_kv, grad_table = BACKWARD(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings, num_buckets)
        return (
            grad_q if needs_q else None,
            grad_kv if needs_kv else None,
            grad_table.to(ctx.bias_dtype) if num_buckets else None,
            *[None] * 9,
        )


def jagged_attention(
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
    seed: Tensor | None = None,
) -> Tensor:
    """See `ops.jagged_attention` and, with q None and kv [T, 3, H, D], `ops.jagged_self_attention`."""
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = next_seed(kv.device)
    return _JaggedAttention.apply(
        None if q is None else with_dense_heads(q),
        with_dense_heads(kv),
        bias_table,
        None if offsets_q is offsets_k else offsets_q,  # compilers refuse one tensor in two places
        offsets_k,
        seed,
        max_q,
        max_k,
        scale,
        max_distance,
        causal,
        dropout_p,
    )
