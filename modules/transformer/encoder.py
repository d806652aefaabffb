"""The encoder stack."""

from torch import Tensor, nn

from modules.transformer.attention import RelativeBias, SelfAttention
from modules.transformer.layers import AddNorm, FeedForward, FinalNorm
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes


class EncoderLayer(nn.Module):
    """Pre-norm self attention and feed-forward layer."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.attention_norm = AddNorm(sizes.d_model, sizes.dropout)
        self.attention = SelfAttention(sizes)
        self.feed_forward_norm = AddNorm(sizes.d_model, sizes.dropout)
        self.feed_forward = FeedForward(sizes.d_model, sizes.d_ff, sizes.dropout)

    def forward(self, x: Tensor, residual: Tensor | None, rows: Rows, bias: RelativeBias) -> tuple[Tensor, Tensor]:
        """Takes and returns (a sub-layer's output that is not yet added, residual stream), both [T, D]."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.feed_forward_norm(self.attention(x, rows, bias), residual)
        return self.feed_forward(x), residual


class Encoder(nn.Module):
    """Two-sided T5 encoder over packed rows.

    Args:
        num_layers: depth.
        sizes: of every layer.
    """

    def __init__(self, num_layers: int, sizes: StackSizes) -> None:
        super().__init__()
        self.bias = RelativeBias(sizes, causal=False)
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(num_layers))
        self.final_norm = FinalNorm(sizes.d_model, sizes.dropout)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[T, D] token embeddings -> [T, D]."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, rows, self.bias)
        return self.final_norm(x, residual)
