"""Causal attention with pointwise SiLU in place of the softmax, forward and backward, without padding or atomics.

A tile is a block of queries against a block of keys of one row and head. Nothing but the output is kept from the
forward: there is no denominator, so the backward has each score again from one product. It computes them once for the
gradient of the queries, once for that of keys and values, and once for that of the bias, each summed by the program
that owns it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
from ops.triton.parts import cdiv, dot, power_of_2


@triton.jit
def _scores(q, k, bias_ptr, places_q, places_k, count, num_heads, scale, HAS_BIAS: tl.constexpr):
    """[BLOCK, BLOCK] fp32 scores, and which pairs attend: the query exists and the key is not ahead of it."""
    scores = dot(q, tl.trans(k)) * scale
    attends = (places_k[None, :] <= places_q[:, None]) & (places_q < count)[:, None]
    if HAS_BIAS:
        distance = places_q[:, None] - places_k[None, :]
        scores += tl.load(bias_ptr + distance * num_heads, mask=attends, other=0.0)
    return scores, attends


@triton.jit
def _weights(scores, attends):
    """SiLU of the scores, zero where nothing attends."""
    return tl.where(attends, scores * tl.sigmoid(scores), 0.0)


@triton.jit
def _grad_scores(scores, attends, grad_out, v):
    """[BLOCK, BLOCK] fp32, but for the normalizer."""
    gate = tl.sigmoid(scores)
    slope = gate * (1.0 + scores * (1.0 - gate))
    return tl.where(attends, dot(grad_out, tl.trans(v)) * slope, 0.0)


@triton.jit
def _jagged_silu_attention_fwd_kernel(
    q_ptr,  # [T, H, D], tokens q_stride apart
    k_ptr,  # [T, H, D], tokens k_stride apart
    v_ptr,  # [T, H, Dv], tokens v_stride apart
    offsets_ptr,  # [B+1] int32
    bias_ptr,  # [max_len or more, H] fp32 by distance; read only if HAS_BIAS
    out_ptr,  # [T, H, Dv] out
    num_tokens,
    num_rows,
    num_heads,
    q_stride,
    k_stride,
    v_stride,
    max_len,
    scale,
    factor,  # 1 / normalizer
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    out_stride = num_heads * VALUE_DIM
    clear_tail(out_ptr, offsets_ptr, num_rows, num_tokens, out_stride, BLOCK * VALUE_WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_q = tl.program_id(1) * BLOCK
    if row >= num_rows:
        return
    begin, count = bounds_of_row(offsets_ptr, row, max_len)
    if first_q >= count:
        return
    q_ptr += head * HEAD_DIM
    k_ptr += head * HEAD_DIM
    v_ptr += head * VALUE_DIM
    places_q = first_q + tl.arange(0, BLOCK)
    q = load_tile(q_ptr, begin, places_q, count, q_stride, HEAD_DIM, WIDTH)
    out = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    for first_k in range(0, tl.minimum(count, first_q + BLOCK), BLOCK):
        places_k = first_k + tl.arange(0, BLOCK)
        k = load_tile(k_ptr, begin, places_k, count, k_stride, HEAD_DIM, WIDTH)
        v = load_tile(v_ptr, begin, places_k, count, v_stride, VALUE_DIM, VALUE_WIDTH)
        scores, attends = _scores(q, k, bias_ptr + head, places_q, places_k, count, num_heads, scale, HAS_BIAS)
        out += dot(_weights(scores, attends).to(v.dtype), v)
    out_ptr += head * VALUE_DIM
    store_tile(out_ptr, out * factor, begin, places_q, count, out_stride, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def _jagged_silu_attention_bwd_q_kernel(
    q_ptr,  # [T, H, D], tokens q_stride apart
    k_ptr,  # [T, H, D], tokens k_stride apart
    v_ptr,  # [T, H, Dv], tokens v_stride apart
    grad_out_ptr,  # [T, H, Dv]
    offsets_ptr,  # [B+1] int32
    bias_ptr,  # [max_len or more, H] fp32 by distance; read only if HAS_BIAS
    grad_q_ptr,  # [T, H, D] out
    num_tokens,
    num_rows,
    num_heads,
    q_stride,
    k_stride,
    v_stride,
    max_len,
    scale,
    factor,  # 1 / normalizer
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    grad_stride, out_stride = num_heads * HEAD_DIM, num_heads * VALUE_DIM
    clear_tail(grad_q_ptr, offsets_ptr, num_rows, num_tokens, grad_stride, BLOCK * WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_q = tl.program_id(1) * BLOCK
    if row >= num_rows:
        return
    begin, count = bounds_of_row(offsets_ptr, row, max_len)
    if first_q >= count:
        return
    q_ptr += head * HEAD_DIM
    k_ptr += head * HEAD_DIM
    v_ptr += head * VALUE_DIM
    grad_out_ptr += head * VALUE_DIM
    places_q = first_q + tl.arange(0, BLOCK)
    q = load_tile(q_ptr, begin, places_q, count, q_stride, HEAD_DIM, WIDTH)
    grad_out = load_tile(grad_out_ptr, begin, places_q, count, out_stride, VALUE_DIM, VALUE_WIDTH)
    grad_q = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first_k in range(0, tl.minimum(count, first_q + BLOCK), BLOCK):
        places_k = first_k + tl.arange(0, BLOCK)
        k = load_tile(k_ptr, begin, places_k, count, k_stride, HEAD_DIM, WIDTH)
        v = load_tile(v_ptr, begin, places_k, count, v_stride, VALUE_DIM, VALUE_WIDTH)
        scores, attends = _scores(q, k, bias_ptr + head, places_q, places_k, count, num_heads, scale, HAS_BIAS)
        grad_q += dot(_grad_scores(scores, attends, grad_out, v).to(k.dtype), k)
    grad_q *= scale * factor
    store_tile(grad_q_ptr + head * HEAD_DIM, grad_q, begin, places_q, count, grad_stride, HEAD_DIM, WIDTH)


@triton.jit
def _jagged_silu_attention_bwd_kv_kernel(
    q_ptr,  # [T, H, D], tokens q_stride apart
    k_ptr,  # [T, H, D], tokens k_stride apart
    v_ptr,  # [T, H, Dv], tokens v_stride apart
    grad_out_ptr,  # [T, H, Dv]
    offsets_ptr,  # [B+1] int32
    bias_ptr,  # [max_len or more, H] fp32 by distance; read only if HAS_BIAS
    grad_k_ptr,  # [T, H, D] out
    grad_v_ptr,  # [T, H, Dv] out
    num_tokens,
    num_rows,
    num_heads,
    q_stride,
    k_stride,
    v_stride,
    max_len,
    scale,
    factor,  # 1 / normalizer
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    grad_stride, out_stride = num_heads * HEAD_DIM, num_heads * VALUE_DIM
    clear_tail(grad_k_ptr, offsets_ptr, num_rows, num_tokens, grad_stride, BLOCK * WIDTH)
    clear_tail(grad_v_ptr, offsets_ptr, num_rows, num_tokens, out_stride, BLOCK * VALUE_WIDTH)
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    first_k = tl.program_id(1) * BLOCK
    if row >= num_rows:
        return
    begin, count = bounds_of_row(offsets_ptr, row, max_len)
    if first_k >= count:
        return
    q_ptr += head * HEAD_DIM
    k_ptr += head * HEAD_DIM
    v_ptr += head * VALUE_DIM
    grad_out_ptr += head * VALUE_DIM
    places_k = first_k + tl.arange(0, BLOCK)
    k = load_tile(k_ptr, begin, places_k, count, k_stride, HEAD_DIM, WIDTH)
    v = load_tile(v_ptr, begin, places_k, count, v_stride, VALUE_DIM, VALUE_WIDTH)
    grad_k = tl.zeros([BLOCK, WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK, VALUE_WIDTH], tl.float32)
    for first_q in range(first_k, count, BLOCK):
        places_q = first_q + tl.arange(0, BLOCK)
        q = load_tile(q_ptr, begin, places_q, count, q_stride, HEAD_DIM, WIDTH)
        grad_out = load_tile(grad_out_ptr, begin, places_q, count, out_stride, VALUE_DIM, VALUE_WIDTH)
        scores, attends = _scores(q, k, bias_ptr + head, places_q, places_k, count, num_heads, scale, HAS_BIAS)
        grad_v += dot(tl.trans(_weights(scores, attends).to(grad_out.dtype)), grad_out)
        grad_k += dot(tl.trans(_grad_scores(scores, attends, grad_out, v).to(q.dtype)), q)
    grad_k *= scale * factor
    grad_v *= factor
    store_tile(grad_k_ptr + head * HEAD_DIM, grad_k, begin, places_k, count, grad_stride, HEAD_DIM, WIDTH)
    store_tile(grad_v_ptr + head * VALUE_DIM, grad_v, begin, places_k, count, out_stride, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def _jagged_silu_attention_bwd_bias_kernel(
    q_ptr,  # [T, H, D], tokens q_stride apart
    k_ptr,  # [T, H, D], tokens k_stride apart
    v_ptr,  # [T, H, Dv], tokens v_stride apart
    grad_out_ptr,  # [T, H, Dv]
    offsets_ptr,  # [B+1] int32
    bias_ptr,  # [max_len or more, H] fp32 by distance
    partial_ptr,  # [slots, H, diagonals, 2 * BLOCK] fp32 out
    num_rows,
    q_stride,
    k_stride,
    v_stride,
    max_len,
    scale,
    factor,  # 1 / normalizer
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    """Sums the tiles of one diagonal, query tile minus key tile, over a slot's share of the rows.

    Places on one diagonal of the sum have one distance. The sum's row m is turned, so that column r holds the distance
    r, of keys up to the query's place, and r - BLOCK, of those behind it, both counted from the tiles' distance.
    """
    slot, diagonal, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(2)
    out_stride = num_heads * VALUE_DIM
    q_ptr += head * HEAD_DIM
    k_ptr += head * HEAD_DIM
    v_ptr += head * VALUE_DIM
    grad_out_ptr += head * VALUE_DIM
    inside = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for row in range(slot, num_rows, tl.num_programs(0)):
        begin, count = bounds_of_row(offsets_ptr, row, max_len)
        for first_k in range(0, count - diagonal * BLOCK, BLOCK):
            places_k = first_k + inside
            places_q = places_k + diagonal * BLOCK
            q = load_tile(q_ptr, begin, places_q, count, q_stride, HEAD_DIM, WIDTH)
            k = load_tile(k_ptr, begin, places_k, count, k_stride, HEAD_DIM, WIDTH)
            v = load_tile(v_ptr, begin, places_k, count, v_stride, VALUE_DIM, VALUE_WIDTH)
            grad_out = load_tile(grad_out_ptr, begin, places_q, count, out_stride, VALUE_DIM, VALUE_WIDTH)
            scores, attends = _scores(q, k, bias_ptr + head, places_q, places_k, count, num_heads, scale, True)
            total += _grad_scores(scores, attends, grad_out, v)
    total *= factor
    turned = tl.gather(total, (inside[:, None] - inside[None, :] + BLOCK) % BLOCK, 1)
    up_to_query = inside[None, :] <= inside[:, None]
    partial_ptr += ((slot * num_heads + head) * tl.num_programs(1) + diagonal).to(tl.int64) * (2 * BLOCK)
    tl.store(partial_ptr + inside, tl.sum(tl.where(up_to_query, turned, 0.0), 0))
    tl.store(partial_ptr + BLOCK + inside, tl.sum(tl.where(up_to_query, 0.0, turned), 0))


@triton.jit
def _jagged_silu_attention_bwd_distance_kernel(
    partial_ptr,  # [slots, H, diagonals, 2 * BLOCK] fp32
    grad_bias_ptr,  # [num_distances, H] fp32 out
    num_slots,
    num_diagonals,
    num_distances,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Sums a block of distances, each of which lies in two neighbouring diagonals, over the slots."""
    diagonal, head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    inside = tl.arange(0, BLOCK)
    total = tl.zeros([SLOTS, BLOCK], tl.float32)
    for first_slot in range(0, num_slots, SLOTS):
        slots = first_slot + tl.arange(0, SLOTS)
        at = ((slots * num_heads + head) * num_diagonals + diagonal).to(tl.int64)[:, None] * (2 * BLOCK)
        at = at + inside[None, :]
        exists = (slots < num_slots)[:, None]
        total += tl.load(partial_ptr + at, mask=exists & (diagonal < num_diagonals), other=0.0)
        total += tl.load(partial_ptr + at + 3 * BLOCK, mask=exists & (diagonal + 1 < num_diagonals), other=0.0)
    distance = diagonal * BLOCK + inside
    tl.store(grad_bias_ptr + distance * num_heads + head, tl.sum(total, 0), mask=distance < num_distances)


def _sizes(max_len: int, q: Tensor, v: Tensor) -> dict[str, int]:
    """Sizes of tiles, which are square, and of heads; `max_len` is rounded."""
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    tiles = tile_sizes(max_len, max_len, max(head_dim, value_dim), q.dtype)
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "WIDTH": power_of_2(head_dim),
        "VALUE_WIDTH": power_of_2(value_dim),
        "BLOCK": tiles["BLOCK_Q"],
        "num_warps": tiles["num_warps"],
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    max_len: int,
    scale: float,
    normalizer: float,
) -> Tensor:
    out = v.new_empty(v.shape)
    max_len = rounded(max_len)
    sizes = _sizes(max_len, q, v)
    num_rows, num_heads = len(offsets) - 1, q.shape[1]
    num_stages = 2 if max_len > 2 * sizes["BLOCK"] else 1
    _jagged_silu_attention_fwd_kernel[(max(1, num_rows * num_heads), cdiv(max_len, sizes["BLOCK"]))](
        q, k, v, offsets, out if bias is None else bias, out,
        len(q), num_rows, num_heads, q.stride(0), k.stride(0), v.stride(0), max_len, scale, 1.0 / normalizer,
        HAS_BIAS=bias is not None, num_stages=num_stages, **sizes,
    )  # fmt: skip
    return out


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    max_len: int,
    scale: float,
    normalizer: float,
) -> Tensor:
    return v.new_empty(v.shape)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    max_len: int,
    scale: float,
    normalizer: float,
    num_distances: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _fake_backward(grad_out, q, k, v, offsets, bias, max_len, scale, normalizer, num_distances)
    grad_q, grad_k, grad_v, grad_bias = grads
    max_len = rounded(max_len)
    sizes = _sizes(max_len, q, v) | {"num_stages": 1}
    num_rows, num_heads = len(offsets) - 1, q.shape[1]
    num_row_heads = max(1, num_rows * num_heads)
    inputs = (q, k, v, grad_out, offsets, grad_out if bias is None else bias)
    strides, rest = (q.stride(0), k.stride(0), v.stride(0)), (max_len, scale, 1.0 / normalizer)
    _jagged_silu_attention_bwd_q_kernel[(num_row_heads, cdiv(max_len, sizes["BLOCK"]))](
        *inputs, grad_q, len(q), num_rows, num_heads, *strides, *rest, HAS_BIAS=bias is not None, **sizes
    )
    _jagged_silu_attention_bwd_kv_kernel[(num_row_heads, cdiv(max_len, sizes["BLOCK"]))](
        *inputs, grad_k, grad_v, len(q), num_rows, num_heads, *strides, *rest, HAS_BIAS=bias is not None, **sizes
    )
    if num_distances:
        block = sizes["BLOCK"]
        num_diagonals = cdiv(max_len, block)
        slots = slots_for(num_rows, num_heads * num_diagonals * 2 * block)
        partials = grad_bias.new_empty(slots, num_heads, num_diagonals, 2 * block)
        _jagged_silu_attention_bwd_bias_kernel[(slots, num_diagonals, num_heads)](
            *inputs, partials, num_rows, *strides, *rest, **sizes
        )
        _jagged_silu_attention_bwd_distance_kernel[(cdiv(num_distances, block), num_heads)](
            partials, grad_bias, slots, num_diagonals, num_distances, BLOCK=block, SLOTS=16, num_warps=4
        )
    return grads


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    max_len: int,
    scale: float,
    normalizer: float,
    num_distances: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(num_distances, q.shape[1], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


FORWARD = define(
    "jagged_silu_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? bias, SymInt max_len, float scale, "
    "float normalizer) -> Tensor",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "jagged_silu_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? bias, "
    "SymInt max_len, float scale, float normalizer, SymInt num_distances) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _JaggedSiluAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        max_len: int,
        scale: float,
        normalizer: float,
    ) -> Tensor:
        ctx.settings = (max_len, scale, normalizer)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide_bias = None if bias is None else bias.float().contiguous()
        ctx.save_for_backward(q, k, v, offsets, wide_bias)
        return FORWARD(q, k, v, offsets, wide_bias, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *needs_heads, needs_bias = ctx.needs_input_grad[:4]
        bias = ctx.saved_tensors[-1]
        num_distances = len(bias) if needs_bias else 0
        *grads, grad_bias = BACKWARD(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings, num_distances)
        heads = (grad if needed else None for grad, needed in zip(grads, needs_heads, strict=True))
        return (*heads, grad_bias.to(ctx.bias_dtype) if needs_bias else None, *[None] * 4)


def jagged_silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_len: int,
    scale: float,
    normalizer: float,
    bias: Tensor | None,
) -> Tensor:
    """See `ops.jagged_silu_attention`."""
    heads = (with_dense_heads(x) for x in (q, k, v))
    return _JaggedSiluAttention.apply(*heads, bias, offsets, max_len, scale, normalizer)
