"""Softmax within each packed row: tile by tile with a running maximum (Milakov and Gimelshein 2018)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.library import define
from ops.triton.packed import clear_tail, tile_of_rows
from ops.triton.parts import cdiv, wide


@triton.jit
def _jagged_softmax_fwd_kernel(
    x_ptr,  # [T, H]
    offsets_ptr,  # [B+1] int32
    softmax_ptr,  # [T, H] out
    num_rows,
    num_tokens,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    clear_tail(softmax_ptr, offsets_ptr, num_rows, num_tokens, width, ROWS * WIDTH)
    begin = tl.load(offsets_ptr + row, mask=row < num_rows, other=0)
    end = tl.load(offsets_ptr + row + 1, mask=row < num_rows, other=0)
    highest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < end)[:, None] & (columns < width)[None, :]
        at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
        x = wide(tl.load(x_ptr + at, mask=mask, other=float("-inf")))
        higher = tl.maximum(highest, tl.max(x, 0))
        # As long as all is -inf, any finite reference gives the sum of 0 that it should be.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - reference) + tl.sum(tl.exp(x - reference[None, :]), 0)
        highest = higher
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < end)[:, None] & (columns < width)[None, :]
        at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
        x = wide(tl.load(x_ptr + at, mask=mask, other=float("-inf")))
        softmax = tl.exp(x - highest[None, :]) / total[None, :]
        tl.store(softmax_ptr + at, softmax.to(softmax_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _jagged_softmax_bwd_kernel(
    grad_ptr,  # [T, H]
    softmax_ptr,  # [T, H]
    offsets_ptr,  # [B+1] int32
    grad_x_ptr,  # [T, H] out
    num_rows,
    num_tokens,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    clear_tail(grad_x_ptr, offsets_ptr, num_rows, num_tokens, width, ROWS * WIDTH)
    begin = tl.load(offsets_ptr + row, mask=row < num_rows, other=0)
    end = tl.load(offsets_ptr + row + 1, mask=row < num_rows, other=0)
    along = tl.zeros([WIDTH], tl.float32)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < end)[:, None] & (columns < width)[None, :]
        at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
        grad = wide(tl.load(grad_ptr + at, mask=mask, other=0.0))
        along += tl.sum(grad * wide(tl.load(softmax_ptr + at, mask=mask, other=0.0)), 0)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < end)[:, None] & (columns < width)[None, :]
        at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
        grad = wide(tl.load(grad_ptr + at, mask=mask, other=0.0))
        grad_x = (grad - along[None, :]) * wide(tl.load(softmax_ptr + at, mask=mask, other=0.0))
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _forward(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    softmax = torch.empty_like(x)
    if x.numel():
        (num_tokens, width), num_rows, blocks = x.shape, len(offsets) - 1, tile_of_rows(max_len, x.shape[1])
        _jagged_softmax_fwd_kernel[(max(1, num_rows), cdiv(width, blocks["WIDTH"]))](
            x, offsets, softmax, num_rows, num_tokens, width, **blocks
        )
    return softmax


def _fake_forward(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    return torch.empty_like(x)


def _backward(grad: Tensor, softmax: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    grad_x = torch.empty_like(softmax)
    if grad.numel():
        (num_tokens, width), num_rows, blocks = grad.shape, len(offsets) - 1, tile_of_rows(max_len, grad.shape[1])
        _jagged_softmax_bwd_kernel[(max(1, num_rows), cdiv(width, blocks["WIDTH"]))](
            grad, softmax, offsets, grad_x, num_rows, num_tokens, width, **blocks
        )
    return grad_x


def _fake_backward(grad: Tensor, softmax: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    return torch.empty_like(softmax)


FORWARD = define("jagged_softmax(Tensor x, Tensor offsets, SymInt max_len) -> Tensor", _forward, _fake_forward)
BACKWARD = define(
    "jagged_softmax_backward(Tensor grad, Tensor softmax, Tensor offsets, SymInt max_len) -> Tensor",
    _backward,
    _fake_backward,
)


class _JaggedSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
        softmax = FORWARD(x, offsets, max_len)
        ctx.save_for_backward(softmax, offsets)
        ctx.max_len = max_len
        return softmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.max_len), None, None


def jagged_softmax(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_softmax`."""
    columns = x if x.dim() == 2 else x[:, None]
    return _JaggedSoftmax.apply(columns.contiguous(), offsets, max_len).view(x.shape)
