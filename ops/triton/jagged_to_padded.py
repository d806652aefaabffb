"""Packed rows to a padded block and back: copies of bits, whatever the dtype, each the other's gradient."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.library import define
from ops.triton.packed import as_bits, copy_blocks, row_of_token
from ops.triton.parts import cdiv


@triton.jit
def _jagged_to_padded_kernel(
    x_ptr,  # [T, D] bits
    offsets_ptr,  # [B+1] int32
    padded_ptr,  # [B, L, D] bits, out
    num_places,  # B * L
    max_len,
    width,
    pad,  # bits
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = places < num_places
    rows = places // max_len
    tokens = tl.load(offsets_ptr + rows, mask=inside, other=0) + places % max_len
    taken = inside & (tokens < tl.load(offsets_ptr + rows + 1, mask=inside, other=0))
    within = (columns < width)[None, :]
    source = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    value = tl.load(x_ptr + source, mask=taken[:, None] & within, other=pad)
    target = places.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(padded_ptr + target, value, mask=inside[:, None] & within)


@triton.jit
def _padded_to_jagged_kernel(
    padded_ptr,  # [B, L, D] bits
    offsets_ptr,  # [B+1] int32
    x_ptr,  # [T, D] bits, out
    num_rows,
    num_tokens,
    max_len,
    width,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rows = row_of_token(offsets_ptr, num_rows, tokens, STEPS)
    places = tokens - tl.load(offsets_ptr + rows)
    inside = tokens < num_tokens
    taken = inside & (rows < num_rows) & (places < max_len)
    within = (columns < width)[None, :]
    source = (rows.to(tl.int64) * max_len + places)[:, None] * width + columns[None, :]
    value = tl.load(padded_ptr + source, mask=taken[:, None] & within, other=0)
    target = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(x_ptr + target, value, mask=inside[:, None] & within)


@functools.cache
def _bits_of(value: float, dtype: torch.dtype) -> int:
    return int(as_bits(torch.tensor(value, dtype=dtype)))


def _jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    padded = _fake_jagged_to_padded(x, offsets, max_len, pad)
    if padded.numel():
        num_places, width = len(padded) * max_len, math.prod(x.shape[1:])
        blocks = copy_blocks(width)
        _jagged_to_padded_kernel[(cdiv(num_places, blocks["ROWS"]), cdiv(width, blocks["WIDTH"]))](
            as_bits(x), offsets, as_bits(padded), num_places, max_len, width, _bits_of(pad, x.dtype), **blocks
        )
    return padded


def _fake_jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    return x.new_empty(len(offsets) - 1, max_len, *x.shape[1:])


def _padded_to_jagged(padded: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    x = _fake_padded_to_jagged(padded, offsets, num_tokens)
    if x.numel():
        (num_rows, max_len), width = padded.shape[:2], math.prod(padded.shape[2:])
        blocks = copy_blocks(width)
        _padded_to_jagged_kernel[(cdiv(num_tokens, blocks["ROWS"]), cdiv(width, blocks["WIDTH"]))](
            as_bits(padded), offsets, as_bits(x), num_rows, num_tokens, max_len, width,
            STEPS=num_rows.bit_length(), **blocks,
        )  # fmt: skip
    return x


def _fake_padded_to_jagged(padded: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    return padded.new_empty(num_tokens, *padded.shape[2:])


FORWARD = define(
    "jagged_to_padded(Tensor x, Tensor offsets, SymInt max_len, Scalar pad) -> Tensor",
    _jagged_to_padded,
    _fake_jagged_to_padded,
)
BACKWARD = define(
    "padded_to_jagged(Tensor padded, Tensor offsets, SymInt num_tokens) -> Tensor",
    _padded_to_jagged,
    _fake_padded_to_jagged,
)


class _JaggedToPadded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_tokens = len(x)
        return FORWARD(x, offsets, max_len, pad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.num_tokens), None, None, None


class _PaddedToJagged(Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.max_len = padded.shape[1]
        return BACKWARD(padded, offsets, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return FORWARD(grad.contiguous(), *ctx.saved_tensors, ctx.max_len, 0), None, None


def jagged_to_padded(x: Tensor, offsets: Tensor, max_len: int, pad: float) -> Tensor:
    """See `ops.jagged_to_padded`."""
    return _JaggedToPadded.apply(x.contiguous(), offsets, max_len, pad)


def padded_to_jagged(x: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """See `ops.padded_to_jagged`."""
    return _PaddedToJagged.apply(x.contiguous(), offsets, num_tokens)
