"""Feed-forward layer and norm of a T5-style transformer (Raffel et al. 2020, section 2.1), without biases."""

import torch
from torch import Tensor, nn

import ops


class AddNorm(nn.Module):
    """Adds a sub-layer's output to the residual stream, with dropout, and norms the sum.

    Args:
        d_model: width.
        dropout: on the sub-layer's output.
    """

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, D] output and stream -> (normed, stream); a stream of None starts one."""
        return ops.add_rms_norm(x, residual, self.weight, dropout_p=self.dropout if self.training else 0.0)


class FinalNorm(nn.Module):
    """The norm behind the last layer, with dropout on its output as in T5."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.add_norm = AddNorm(d_model, dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[T, D] last output and stream -> [T, D]."""
        normed, _ = self.add_norm(x, residual)
        return ops.dropout(normed, dropout_p=self.add_norm.dropout if self.training else 0.0)


class FeedForward(nn.Module):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(d_ff, d_model) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(d_model, d_ff) * d_ff**-0.5)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.relu_feed_forward(x, self.w_in, self.w_out, dropout_p=self.dropout if self.training else 0.0)
