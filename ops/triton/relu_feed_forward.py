"""T5's feed-forward layer: the device's library multiplies, kernels do what lies between the products in place."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.seeds import next_seed
from ops.triton.dropout import tiles
from ops.triton.library import define
from ops.triton.parts import cdiv, keep_mask, threshold_of, wide

_BLOCK = 2048


@triton.jit
def _relu_feed_forward_fwd_kernel(
    hidden_ptr,  # [T, F] x @ w_in.T, overwritten by dropout(relu(.))
    seed_ptr,  # [1] int64; read only if DROPOUT
    num_rows,
    num_columns,
    column_blocks,
    threshold,
    factor,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) % column_blocks * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    hidden = wide(tl.load(hidden_ptr + at, mask=mask, other=0.0))
    # Unlike a maximum, this lets NaN through, as torch's ReLU does: a broken run must show.
    hidden = tl.where(hidden < 0.0, 0.0, hidden)
    if DROPOUT:
        keep = keep_mask(seed_ptr, rows, first_column, 0, threshold, ROWS, COLUMNS)
        hidden = tl.where(keep, hidden * factor, 0.0)
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_feed_forward_bwd_kernel(
    hidden_ptr,  # [T * F] dropout(relu(.)), zero exactly where either stops the gradient
    grad_ptr,  # [T * F] its gradient, overwritten by the gradient before ReLU
    num_elements,
    factor,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    hidden = wide(tl.load(hidden_ptr + at, mask=mask, other=0.0))
    grad = wide(tl.load(grad_ptr + at, mask=mask, other=0.0))
    grad = tl.where(hidden == 0.0, 0.0, grad * factor)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _forward(x: Tensor, w_in: Tensor, w_out: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    hidden = torch.mm(x, w_in.t())
    grid, column_blocks, blocks = tiles(*hidden.shape)
    _relu_feed_forward_fwd_kernel[grid](
        hidden, hidden if seed is None else seed, *hidden.shape, column_blocks,
        threshold_of(dropout_p), 1.0 / (1.0 - dropout_p), DROPOUT=seed is not None, **blocks,
    )  # fmt: skip
    return torch.mm(hidden, w_out.t()), hidden


def _fake_forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w_out.shape[0]), x.new_empty(x.shape[0], w_in.shape[0])


def _backward(
    grad: Tensor, x: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = torch.mm(grad, w_out)
    _relu_feed_forward_bwd_kernel[(cdiv(hidden.numel(), _BLOCK),)](
        hidden, grad_hidden, hidden.numel(), 1.0 / (1.0 - dropout_p), BLOCK=_BLOCK, num_warps=4
    )
    return torch.mm(grad_hidden, w_in), torch.mm(grad_hidden.t(), x), torch.mm(grad.t(), hidden)


def _fake_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w_in.new_empty(w_in.shape), w_out.new_empty(w_out.shape)


FORWARD = define(
    "relu_feed_forward(Tensor x, Tensor w_in, Tensor w_out, Tensor? seed, float dropout_p) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "relu_feed_forward_backward(Tensor grad, Tensor x, Tensor hidden, Tensor w_in, Tensor w_out, float dropout_p) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _ReluFeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
        out, hidden = FORWARD(x, w_in, w_out, seed, dropout_p)
        ctx.save_for_backward(x, hidden, w_in, w_out)
        ctx.dropout_p = dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.dropout_p), None, None


def relu_feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float, seed: Tensor | None = None) -> Tensor:
    """See `ops.relu_feed_forward`."""
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = next_seed(x.device)
    return _ReluFeedForward.apply(x, w_in, w_out, seed, dropout_p)
