"""Sizes that the layers of encoder and decoder share."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StackSizes:
    """Sizes of one layer, of which a stack has several.

    Attributes:
        d_model: width of the residual stream.
        num_heads, head_dim: of every attention.
        d_ff: width of the hidden feed-forward layer.
        dropout: everywhere where T5 has it.
        relative_buckets, relative_max_distance: of the position bias.
    """

    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    dropout: float
    relative_buckets: int
    relative_max_distance: int
