"""T5's feed-forward layer, in blocks of rows so that the wide hidden layer is touched while it is in cache."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.cpu.blocks import row_blocks
from ops.cpu.dropout import keep_mask

_BLOCK_ROWS = 512


class _ReluFeedForward(Function):
    """Keeps one hidden tensor: it is zero exactly where ReLU or dropout stops the gradient.

    Dropout's factor 1 / (1 - p) goes into the small output weight instead of the wide hidden tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float) -> Tensor:
        factor = 1.0 / (1.0 - dropout_p)
        scaled_w_out = w_out * factor
        hidden, out = x.new_empty(len(x), len(w_in)), torch.empty_like(x)
        for block in row_blocks(x, _BLOCK_ROWS):
            part = torch.mm(x[block], w_in.t(), out=hidden[block]).relu_()
            if dropout_p > 0.0:
                part.mul_(keep_mask(part.shape, dropout_p, part.device))
            torch.mm(part, scaled_w_out.t(), out=out[block])
        ctx.save_for_backward(x, hidden, w_in, scaled_w_out)
        ctx.factor = factor
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, hidden, w_in, scaled_w_out = ctx.saved_tensors
        grad_x, grad_w_in, grad_w_out = torch.empty_like(x), torch.zeros_like(w_in), torch.zeros_like(scaled_w_out)
        for block in row_blocks(x, _BLOCK_ROWS):
            part, part_grad = hidden[block], grad[block]
            grad_w_out.addmm_(part_grad.t(), part)
            grad_part = part_grad @ scaled_w_out
            torch.ops.aten.threshold_backward.grad_input(grad_part, part, 0.0, grad_input=grad_part)
            grad_w_in.addmm_(grad_part.t(), x[block])
            torch.mm(grad_part, w_in, out=grad_x[block])
        return grad_x, grad_w_in, grad_w_out.mul_(ctx.factor), None


def relu_feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, dropout_p: float) -> Tensor:
    """See `ops.relu_feed_forward`."""
    return _ReluFeedForward.apply(x, w_in, w_out, dropout_p)
