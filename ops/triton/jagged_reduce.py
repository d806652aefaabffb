"""Sum or mean of the tokens of each packed row."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.library import define
from ops.triton.packed import copy_blocks, row_of_token, tile_of_rows
from ops.triton.parts import cdiv, wide


@triton.jit
def _jagged_reduce_fwd_kernel(
    x_ptr,  # [T, D]
    offsets_ptr,  # [B+1] int32
    reduced_ptr,  # [B, D] out
    width,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)
        mask = (tokens < end)[:, None] & (columns < width)[None, :]
        sums += wide(tl.load(x_ptr + tokens.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0))
    reduced = tl.sum(sums, 0)
    if MEAN:
        reduced /= tl.maximum(end - begin, 1)
    at = row.to(tl.int64) * width + columns
    tl.store(reduced_ptr + at, reduced.to(reduced_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def _jagged_reduce_bwd_kernel(
    grad_ptr,  # [B, D]
    offsets_ptr,  # [B+1] int32
    grad_x_ptr,  # [T, D] out
    num_rows,
    num_tokens,
    width,
    MEAN: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    rows = row_of_token(offsets_ptr, num_rows, tokens, STEPS)
    taken = (tokens < num_tokens) & (rows < num_rows)
    within = (columns < width)[None, :]
    source = rows.to(tl.int64)[:, None] * width + columns[None, :]
    grad = wide(tl.load(grad_ptr + source, mask=taken[:, None] & within, other=0.0))
    if MEAN:
        length = tl.load(offsets_ptr + rows + 1, mask=taken, other=1) - tl.load(offsets_ptr + rows, mask=taken, other=0)
        grad /= length[:, None]
    target = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(grad_x_ptr + target, grad.to(grad_x_ptr.dtype.element_ty), mask=(tokens < num_tokens)[:, None] & within)


def _forward(x: Tensor, offsets: Tensor, max_len: int, mean: bool) -> Tensor:
    reduced = _fake_forward(x, offsets, max_len, mean)
    if reduced.numel():
        blocks = tile_of_rows(max_len, x.shape[1])
        grid = len(reduced), cdiv(x.shape[1], blocks["WIDTH"])
        _jagged_reduce_fwd_kernel[grid](x, offsets, reduced, x.shape[1], MEAN=mean, **blocks)
    return reduced


def _fake_forward(x: Tensor, offsets: Tensor, max_len: int, mean: bool) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1])


def _backward(grad: Tensor, offsets: Tensor, num_tokens: int, mean: bool) -> Tensor:
    grad_x = _fake_backward(grad, offsets, num_tokens, mean)
    if grad_x.numel():
        num_rows, width = grad.shape
        blocks = copy_blocks(width)
        _jagged_reduce_bwd_kernel[(cdiv(num_tokens, blocks["ROWS"]), cdiv(width, blocks["WIDTH"]))](
            grad, offsets, grad_x, num_rows, num_tokens, width, MEAN=mean, STEPS=num_rows.bit_length(), **blocks
        )
    return grad_x


def _fake_backward(grad: Tensor, offsets: Tensor, num_tokens: int, mean: bool) -> Tensor:
    return grad.new_empty(num_tokens, grad.shape[1])


FORWARD = define(
    "jagged_reduce(Tensor x, Tensor offsets, SymInt max_len, bool mean) -> Tensor", _forward, _fake_forward
)
BACKWARD = define(
    "jagged_reduce_backward(Tensor grad, Tensor offsets, SymInt num_tokens, bool mean) -> Tensor",
    _backward,
    _fake_backward,
)


class _JaggedReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, max_len: int, mean: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_tokens, ctx.mean = len(x), mean
        return FORWARD(x, offsets, max_len, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.num_tokens, ctx.mean), None, None, None


def jagged_sum(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_sum`."""
    return _JaggedReduce.apply(x.contiguous(), offsets, max_len, False)


def jagged_mean(x: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """See `ops.jagged_mean`."""
    return _JaggedReduce.apply(x.contiguous(), offsets, max_len, True)
