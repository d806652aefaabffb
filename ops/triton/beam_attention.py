"""Attention of beams during generation: over their row's keys, and over their own ancestors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.library import define
from ops.triton.parts import cdiv, dot, power_of_2, wide

_MAX_BLOCK = 64
"""Beams and keys per tile of cross attention at most; each 64 beams read their row's keys once."""


@triton.jit
def _beams(row, head, num_beams, beam_stride, HEAD_DIM: tl.constexpr, BEAMS: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses in [B, W, H, D] of one head of this program's beams, [BEAMS, WIDTH], and which of them exist."""
    beams = tl.program_id(1) * BEAMS + tl.arange(0, BEAMS)
    columns = tl.arange(0, WIDTH)
    at = (row.to(tl.int64) * num_beams + beams)[:, None] * beam_stride + head * HEAD_DIM + columns[None, :]
    return at, (beams < num_beams)[:, None] & (columns < HEAD_DIM)[None, :]


@triton.jit
def _beam_cross_attention_fwd_kernel(
    q_ptr,  # [B, W, H, D], beams q_stride apart
    kv_ptr,  # [T, 2, H, D], tokens kv_stride and the two kv_slot_stride apart
    offsets_ptr,  # [B+1] int32
    out_ptr,  # [B, W, H, D] out
    num_beams,
    num_heads,
    q_stride,
    kv_stride,
    kv_slot_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BEAMS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    at, exists = _beams(row, head, num_beams, q_stride, HEAD_DIM, BEAMS, WIDTH)
    q = tl.load(q_ptr + at, mask=exists, other=0.0)
    columns = tl.arange(0, WIDTH)
    begin = tl.load(offsets_ptr + row)
    count = tl.load(offsets_ptr + row + 1) - begin
    highest = tl.full([BEAMS], float("-inf"), tl.float32)
    total = tl.zeros([BEAMS], tl.float32)
    out = tl.zeros([BEAMS, WIDTH], tl.float32)
    for first in range(0, count, KEYS):
        keys = first + tl.arange(0, KEYS)
        kv_at = (begin + keys).to(tl.int64)[:, None] * kv_stride + head * HEAD_DIM + columns[None, :]
        kv_exists = (keys < count)[:, None] & (columns < HEAD_DIM)[None, :]
        k = tl.load(kv_ptr + kv_at, mask=kv_exists, other=0.0)
        v = tl.load(kv_ptr + kv_slot_stride + kv_at, mask=kv_exists, other=0.0)
        scores = tl.where((keys < count)[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + dot(weights.to(v.dtype), v)
        highest = new_highest
    out = out / tl.where(count > 0, total, 1.0)[:, None]
    at, _ = _beams(row, head, num_beams, num_heads * HEAD_DIM, HEAD_DIM, BEAMS, WIDTH)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _beam_self_attention_fwd_kernel(
    q_ptr,  # [B, W, H, D], beams q_stride apart
    cache_ptr,  # [S, B, slots, 2, H, D], strides given but for the last two
    ancestors_ptr,  # [B, W, steps] int64, contiguous
    bias_ptr,  # [H, steps], heads bias_stride and steps bias_step_stride apart; read only if HAS_BIAS
    out_ptr,  # [B, W, H, D] out
    num_beams,
    num_heads,
    q_stride,
    cache_step_stride,
    cache_row_stride,
    cache_slot_stride,
    cache_part_stride,
    bias_stride,
    bias_step_stride,
    scale,
    HAS_BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BEAMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    at, exists = _beams(row, head, num_beams, q_stride, HEAD_DIM, BEAMS, WIDTH)
    q = wide(tl.load(q_ptr + at, mask=exists, other=0.0))
    beams = tl.program_id(1) * BEAMS + tl.arange(0, BEAMS)
    columns = tl.arange(0, WIDTH)
    ancestors_ptr += (row.to(tl.int64) * num_beams + beams) * STEPS
    cache_ptr += row.to(tl.int64) * cache_row_stride + head * HEAD_DIM
    highest = tl.full([BEAMS], float("-inf"), tl.float32)
    total = tl.zeros([BEAMS], tl.float32)
    out = tl.zeros([BEAMS, WIDTH], tl.float32)
    for step in tl.static_range(STEPS):  # few: unrolled, so that all steps' keys and values are on their way at once
        slots = tl.load(ancestors_ptr + step, mask=beams < num_beams, other=0)
        own_at = tl.cast(step, tl.int64) * cache_step_stride + (slots * cache_slot_stride)[:, None] + columns[None, :]
        k = wide(tl.load(cache_ptr + own_at, mask=exists, other=0.0))
        v = wide(tl.load(cache_ptr + cache_part_stride + own_at, mask=exists, other=0.0))
        scores = tl.sum(q * k, 1) * scale
        if HAS_BIAS:
            scores += wide(tl.load(bias_ptr + head * bias_stride + step * bias_step_stride))
        new_highest = tl.maximum(highest, scores)
        shrink = tl.exp(highest - new_highest)
        weights = tl.exp(scores - new_highest)
        total = total * shrink + weights
        out = out * shrink[:, None] + v * weights[:, None]
        highest = new_highest
    at, _ = _beams(row, head, num_beams, num_heads * HEAD_DIM, HEAD_DIM, BEAMS, WIDTH)
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=exists)


def _cross_blocks(num_beams: int, max_k: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles whose products stay in registers: fp32 ones, which tensor cores do not take, need the most."""
    width = power_of_2(head_dim)
    exact = dtype == torch.float32
    beams = power_of_2(min(num_beams, _MAX_BLOCK, 4096 // width))
    keys = power_of_2(min(max_k, _MAX_BLOCK, (2048 if exact else 4096) // width))
    return {
        "BEAMS": beams,
        "KEYS": keys,
        "WIDTH": width,
        "num_warps": 8 if exact and beams > 16 else 4,
        "num_stages": 2,
    }


def _self_blocks(num_beams: int, head_dim: int) -> dict[str, int]:
    """Programs of some 2,048 elements."""
    width = power_of_2(head_dim)
    return {"BEAMS": min(power_of_2(num_beams, least=1), 2048 // width), "WIDTH": width, "num_warps": 4}


def _cross_forward(q: Tensor, kv: Tensor, offsets_k: Tensor, max_k: int, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    num_rows, num_beams, num_heads, head_dim = q.shape
    blocks = _cross_blocks(num_beams, max_k, head_dim, q.dtype)
    q, kv = _dense(q.flatten(0, 1)), _dense(kv)
    if out.numel() > 0:
        _beam_cross_attention_fwd_kernel[(num_rows * num_heads, cdiv(num_beams, blocks["BEAMS"]))](
            q, kv, offsets_k, out, num_beams, num_heads, q.stride(0), kv.stride(0), kv.stride(1), scale,
            HEAD_DIM=head_dim, **blocks,
        )  # fmt: skip
    return out


def _self_forward(q: Tensor, cache: Tensor, ancestors: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    num_rows, num_beams, num_heads, head_dim = q.shape
    blocks = _self_blocks(num_beams, head_dim)
    q, cache, ancestors = _dense(q.flatten(0, 1)), _dense(cache), ancestors.contiguous()
    if out.numel() > 0:
        _beam_self_attention_fwd_kernel[(num_rows * num_heads, cdiv(num_beams, blocks["BEAMS"]))](
            q, cache, ancestors, q if bias is None else bias, out, num_beams, num_heads, q.stride(0),
            *cache.stride()[:4], *((0, 0) if bias is None else bias.stride()), scale,
            HAS_BIAS=bias is not None, STEPS=ancestors.shape[2], HEAD_DIM=head_dim, **blocks,
        )  # fmt: skip
    return out


def _dense(x: Tensor) -> Tensor:
    """X itself where its heads [H, D] lie densely, as those of one layer or product out of many do; else a copy."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


BEAM_CROSS_ATTENTION_FORWARD = define(
    "beam_cross_attention(Tensor q, Tensor kv, Tensor offsets_k, SymInt max_k, float scale) -> Tensor",
    _cross_forward,
    lambda q, kv, offsets_k, max_k, scale: q.new_empty(q.shape),
)
BEAM_SELF_ATTENTION_FORWARD = define(
    "beam_self_attention(Tensor q, Tensor cache, Tensor ancestors, Tensor? bias, float scale) -> Tensor",
    _self_forward,
    lambda q, cache, ancestors, bias, scale: q.new_empty(q.shape),
)


def beam_cross_attention(q: Tensor, kv: Tensor, offsets_k: Tensor, max_k: int, scale: float) -> Tensor:
    """See `ops.beam_cross_attention`."""
    return BEAM_CROSS_ATTENTION_FORWARD(q, kv, offsets_k, max_k, scale)


def beam_self_attention(q: Tensor, cache: Tensor, ancestors: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """See `ops.beam_self_attention`."""
    return BEAM_SELF_ATTENTION_FORWARD(q, cache, ancestors, bias, scale)
