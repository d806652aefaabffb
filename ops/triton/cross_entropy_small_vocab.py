"""Cross-entropy over one level's codes: each row's loss and, in the same pass, its gradient."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.dropout import tiles
from ops.triton.library import define
from ops.triton.parts import power_of_2, wide

_MAX_BLOCK = 8192
"""Columns that a program holds at once; wider slices are read tile by tile."""


@triton.jit
def _cross_entropy_small_vocab_fwd_kernel(
    logits_ptr,  # [R, K]
    target_ptr,  # [R] int64, counted from the slice's first column
    slices_ptr,  # [P, 2] int32, first column and end of slice r % P
    loss_ptr,  # [R] fp32 out
    grad_ptr,  # [R, K] out, gradient of each row's own loss times grad_scale; written only if WITH_GRAD
    num_columns,
    num_slices,
    ignore_index,
    smoothing,
    grad_scale,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(slices_ptr + row % num_slices * 2)
    end = tl.load(slices_ptr + row % num_slices * 2 + 1)
    target = tl.load(target_ptr + row)
    start = row.to(tl.int64) * num_columns
    columns = tl.arange(0, BLOCK)

    largest = begin * 0.0 - float("inf")
    shift = begin * 0.0
    total = begin * 0.0  # sum of exp(x - shift)
    picked = begin * 0.0  # the target's logit
    level_sum = begin * 0.0
    for first in range(begin, end, BLOCK):
        at = first + columns
        inside = at < end
        x = wide(tl.load(logits_ptr + start + at, mask=inside, other=float("-inf")))
        new_largest = tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        picked += tl.sum(tl.where(at - begin == target, x, 0.0), 0)
        level_sum += tl.sum(tl.where(inside, x, 0.0), 0)
        largest = new_largest

    size = end - begin
    loss = tl.log(total) - (1.0 - smoothing) * (picked - shift)
    if smoothing > 0.0:
        loss -= smoothing * (level_sum / size - shift)
    # Targets on a device are not checked: NaN shows a wrong one without a host synchronisation.
    loss = tl.where((target >= 0) & (target < size), loss, float("nan"))
    counts = target != ignore_index
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if WITH_GRAD:
        for first in range(0, num_columns, BLOCK):
            at = first + columns
            inside = (at >= begin) & (at < end)
            x = wide(tl.load(logits_ptr + start + at, mask=inside, other=float("-inf")))
            wanted = tl.where(at - begin == target, 1.0 - smoothing, 0.0) + smoothing / size
            grad = tl.where(inside & counts, (tl.exp(x - shift) / total - wanted) * grad_scale, 0.0)
            tl.store(grad_ptr + start + at, grad.to(grad_ptr.dtype.element_ty), mask=at < num_columns)


@triton.jit
def _cross_entropy_small_vocab_bwd_kernel(
    grad_loss_ptr,  # [R] fp32
    row_grad_ptr,  # [R, K] gradient of each row's own loss times grad_scale
    grad_ptr,  # [R, K] out
    num_rows,
    num_columns,
    column_blocks,
    grad_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    grad_loss = tl.load(grad_loss_ptr + rows, mask=rows < num_rows, other=0.0)
    grad = wide(tl.load(row_grad_ptr + at, mask=mask, other=0.0)) * (grad_loss / grad_scale)[:, None]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _grad_scale(dtype: torch.dtype) -> float:
    """Power of two by which gradients, none above 1, are kept: fp16 would lose those of unlikely codes."""
    return 32768.0 if dtype == torch.float16 else 1.0


@functools.cache
def _on_device(level_slices: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a copy from the host at every call would stall the device."""
    return torch.tensor(level_slices, dtype=torch.int32, device=device)


def _forward(
    logits: Tensor,
    target: Tensor,
    level_slices: list[int],
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss, grad = _fake_forward(logits, target, level_slices, ignore_index, label_smoothing, with_grad)
    num_rows, num_columns = logits.shape
    widest = max(end - begin for begin, end in zip(level_slices[::2], level_slices[1::2], strict=True))
    block = min(power_of_2(widest), _MAX_BLOCK)
    if num_rows > 0:
        _cross_entropy_small_vocab_fwd_kernel[(num_rows,)](
            logits, target, _on_device(tuple(level_slices), logits.device), loss, grad,
            num_columns, len(level_slices) // 2, ignore_index, label_smoothing, _grad_scale(logits.dtype),
            WITH_GRAD=with_grad, BLOCK=block, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return loss, grad


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    level_slices: list[int],
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(logits) if with_grad else logits.new_empty(0)


def _backward(grad_loss: Tensor, row_grad: Tensor) -> Tensor:
    grad = torch.empty_like(row_grad)
    grid, column_blocks, blocks = tiles(*row_grad.shape)
    _cross_entropy_small_vocab_bwd_kernel[grid](
        grad_loss, row_grad, grad, *row_grad.shape, column_blocks, _grad_scale(row_grad.dtype), **blocks
    )
    return grad


def _fake_backward(grad_loss: Tensor, row_grad: Tensor) -> Tensor:
    return torch.empty_like(row_grad)


FORWARD = define(
    "cross_entropy_small_vocab(Tensor logits, Tensor target, int[] level_slices, int ignore_index, "
    "float label_smoothing, bool with_grad) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "cross_entropy_small_vocab_backward(Tensor grad_loss, Tensor row_grad) -> Tensor", _backward, _fake_backward
)


class _CrossEntropySmallVocab(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        level_slices: list[int],
        ignore_index: int,
        label_smoothing: float,
        with_grad: bool,
    ) -> Tensor:
        loss, row_grad = FORWARD(logits, target, level_slices, ignore_index, label_smoothing, with_grad)
        ctx.save_for_backward(row_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (row_grad,) = ctx.saved_tensors
        return BACKWARD(grad_loss.contiguous(), row_grad), None, None, None, None, None


def cross_entropy_small_vocab(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    level_slices: tuple[tuple[int, int], ...],
) -> Tensor:
    """See `ops.cross_entropy_small_vocab`."""
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    bounds = [bound for level_slice in level_slices for bound in level_slice]
    return _CrossEntropySmallVocab.apply(
        logits.contiguous(), target.contiguous(), bounds, ignore_index, label_smoothing, with_grad
    )
