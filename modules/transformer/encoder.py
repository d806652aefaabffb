"""The encoder stack."""

from torch import Tensor, nn

from modules.transformer.attention import RelativeBias, SelfAttention
from modules.transformer.layers import AddNorm, FeedForward, FinalNorm
from modules.transformer.rows import Rows


class EncoderLayer(nn.Module):
    """Pre-norm self attention and feed-forward layer."""

    def __init__(self, d_model: int, num_heads: int, head_dim: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = AddNorm(d_model, dropout)
        self.attention = SelfAttention(d_model, num_heads, head_dim, dropout)
        self.feed_forward_norm = AddNorm(d_model, dropout)
        self.feed_forward = FeedForward(d_model, d_ff, dropout)

    def forward(self, x: Tensor, residual: Tensor | None, rows: Rows, bias: RelativeBias) -> tuple[Tensor, Tensor]:
        """Takes and returns (a sub-layer's output that is not yet added, residual stream), both [T, D]."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.feed_forward_norm(self.attention(x, rows, bias), residual)
        return self.feed_forward(x), residual


class Encoder(nn.Module):
    """Two-sided T5 encoder over packed rows.

    Args:
        num_layers: depth.
        d_model, num_heads, head_dim, d_ff: sizes of a layer.
        dropout: everywhere where T5 has it.
        relative_buckets, relative_max_distance: of the position bias.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        d_model: int,
        num_heads: int,
        head_dim: int,
        d_ff: int,
        dropout: float,
        relative_buckets: int,
        relative_max_distance: int,
    ) -> None:
        super().__init__()
        self.bias = RelativeBias(relative_buckets, relative_max_distance, num_heads, causal=False)
        self.layers = nn.ModuleList(
            EncoderLayer(d_model, num_heads, head_dim, d_ff, dropout) for _ in range(num_layers)
        )
        self.final_norm = FinalNorm(d_model, dropout)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[T, D] token embeddings -> [T, D]."""
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, rows, self.bias)
        return self.final_norm(x, residual)
