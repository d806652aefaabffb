"""Row-wise concatenation of packed tensors and its inverse: copies of bits, each the other's gradient.

The kernels take two parts, which is what a token sequence is made of; more are folded.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
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
def _parts_of(tokens, first_offsets_ptr, second_offsets_ptr, offsets_ptr, num_rows, num_first, STEPS: tl.constexpr):
    """Where tokens of the concatenation come from: (belong to a row, are of the first part, places in both parts).

    The tails of the parts count as a row more, so that every token of either part has its place.
    """
    rows = row_of_token(offsets_ptr, num_rows, tokens, STEPS)
    begin = tl.load(first_offsets_ptr + rows)
    length = tl.load(first_offsets_ptr + rows + 1, mask=rows < num_rows, other=num_first) - begin
    place = tokens - tl.load(offsets_ptr + rows)
    in_second = tl.load(second_offsets_ptr + rows) + place - length
    return rows < num_rows, place < length, begin + place, in_second


@triton.jit
def _jagged_concat_kernel(
    first_ptr,  # [T1, D] bits
    second_ptr,  # [T2, D] bits
    first_offsets_ptr,  # [B+1] int32
    second_offsets_ptr,  # [B+1] int32
    offsets_ptr,  # [B+1] int32, their sum
    packed_ptr,  # [T1 + T2, D] bits, out
    num_rows,
    num_first,  # T1
    num_tokens,  # T1 + T2
    width,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    taken, from_first, in_first, in_second = _parts_of(
        tokens, first_offsets_ptr, second_offsets_ptr, offsets_ptr, num_rows, num_first, STEPS
    )
    inside = tokens < num_tokens
    within = (columns < width)[None, :]
    at_first = in_first.to(tl.int64)[:, None] * width + columns[None, :]
    at_second = in_second.to(tl.int64)[:, None] * width + columns[None, :]
    first = tl.load(first_ptr + at_first, mask=(inside & taken & from_first)[:, None] & within, other=0)
    second = tl.load(second_ptr + at_second, mask=(inside & taken & ~from_first)[:, None] & within, other=0)
    at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(packed_ptr + at, tl.where(from_first[:, None], first, second), mask=inside[:, None] & within)


@triton.jit
def _jagged_split_kernel(
    packed_ptr,  # [T1 + T2, D] bits
    first_offsets_ptr,  # [B+1] int32
    second_offsets_ptr,  # [B+1] int32
    offsets_ptr,  # [B+1] int32, their sum
    first_ptr,  # [T1, D] bits, out
    second_ptr,  # [T2, D] bits, out
    num_rows,
    num_first,  # T1
    num_tokens,  # T1 + T2
    width,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    taken, to_first, in_first, in_second = _parts_of(
        tokens, first_offsets_ptr, second_offsets_ptr, offsets_ptr, num_rows, num_first, STEPS
    )
    inside = tokens < num_tokens
    within = (columns < width)[None, :]
    at = tokens.to(tl.int64)[:, None] * width + columns[None, :]
    value = tl.load(packed_ptr + at, mask=(inside & taken)[:, None] & within, other=0)
    at_first = in_first.to(tl.int64)[:, None] * width + columns[None, :]
    at_second = in_second.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(first_ptr + at_first, value, mask=(inside & to_first)[:, None] & within)
    tl.store(second_ptr + at_second, value, mask=(inside & ~to_first)[:, None] & within)


def _concat(first: Tensor, second: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor) -> Tensor:
    packed = _fake_concat(first, second, first_offsets, second_offsets, offsets)
    if packed.numel():
        num_rows, width = len(offsets) - 1, math.prod(packed.shape[1:])
        blocks = copy_blocks(width)
        _jagged_concat_kernel[(cdiv(len(packed), blocks["ROWS"]), cdiv(width, blocks["WIDTH"]))](
            as_bits(first), as_bits(second), first_offsets, second_offsets, offsets, as_bits(packed),
            num_rows, len(first), len(packed), width, STEPS=num_rows.bit_length(), **blocks,
        )  # fmt: skip
    return packed


def _fake_concat(
    first: Tensor, second: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor
) -> Tensor:
    return first.new_empty(first.shape[0] + second.shape[0], *first.shape[1:])


def _split(
    packed: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor, num_first: int
) -> tuple[Tensor, Tensor]:
    first, second = _fake_split(packed, first_offsets, second_offsets, offsets, num_first)
    if packed.numel():
        num_rows, width = len(offsets) - 1, math.prod(packed.shape[1:])
        blocks = copy_blocks(width)
        _jagged_split_kernel[(cdiv(len(packed), blocks["ROWS"]), cdiv(width, blocks["WIDTH"]))](
            as_bits(packed), first_offsets, second_offsets, offsets, as_bits(first), as_bits(second),
            num_rows, num_first, len(packed), width, STEPS=num_rows.bit_length(), **blocks,
        )  # fmt: skip
    return first, second


def _fake_split(
    packed: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor, num_first: int
) -> tuple[Tensor, Tensor]:
    width = packed.shape[1:]
    return packed.new_empty(num_first, *width), packed.new_empty(packed.shape[0] - num_first, *width)


FORWARD = define(
    "jagged_concat(Tensor first, Tensor second, Tensor first_offsets, Tensor second_offsets, Tensor offsets) -> Tensor",
    _concat,
    _fake_concat,
)
BACKWARD = define(
    "jagged_split(Tensor packed, Tensor first_offsets, Tensor second_offsets, Tensor offsets, SymInt num_first) "
    "-> (Tensor, Tensor)",
    _split,
    _fake_split,
)


class _JaggedConcat(Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first_offsets, second_offsets, offsets)
        ctx.num_first = len(first)
        return FORWARD(first, second, first_offsets, second_offsets, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_first, grad_second = BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.num_first)
        return grad_first, grad_second, None, None, None


class _JaggedSplit(Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, first_offsets: Tensor, second_offsets: Tensor, offsets: Tensor, num_first: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first_offsets, second_offsets, offsets)
        return BACKWARD(packed, first_offsets, second_offsets, offsets, num_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        grad = FORWARD(grad_first.contiguous(), grad_second.contiguous(), *ctx.saved_tensors)
        return grad, None, None, None, None


def jagged_concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.jagged_concat`."""
    packed, bounds = parts[0].contiguous(), offsets[0]
    for part, own in zip(parts[1:], offsets[1:], strict=True):
        longer = bounds + own
        packed, bounds = _JaggedConcat.apply(packed, part.contiguous(), bounds, own, longer), longer
    return packed, bounds


def jagged_split(x: Tensor, offsets: Sequence[Tensor], num_tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """See `ops.jagged_split`."""
    bounds = list(accumulate(offsets, torch.add))
    parts, rest = [], x.contiguous()
    for last in range(len(offsets) - 1, 0, -1):
        arguments = bounds[last - 1], offsets[last], bounds[last], sum(num_tokens[:last])
        rest, part = _JaggedSplit.apply(rest, *arguments)
        parts.append(part)
    return (rest, *reversed(parts))
