"""SASRec: causal self attention over the items of a history (Kang and McAuley 2018, arXiv 1808.09781).

Trained with cross-entropy over the whole catalogue in place of the paper's single sampled negative, which is known to
do better. Norms are root-mean-square norms and feed-forward layers have no biases, as in the other transformers here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

import ops
from data.schemas import InputError, SeqBatch
from modules.sequential.next_item import INITIAL_STD, NextItemConfig, NextItemModel, positions_in_rows
from modules.transformer.attention import scaled_linear
from modules.transformer.layers import AddNorm, FeedForward


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(NextItemConfig):
    """Sizes of a SASRec.

    Attributes:
        num_layers: blocks of attention and feed-forward layer.
        num_heads: of every attention; they share the width.
        d_ff: width of the hidden feed-forward layer.
        norm: in front of every layer ("pre"), or behind the sum of its input and output ("post").
    """

    num_layers: int = 2
    num_heads: int = 2
    d_ff: int = 64
    norm: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.num_heads != 0:
            raise InputError(
                f"SASRecConfig expected d_model as a multiple of num_heads, got {self.d_model} and {self.num_heads}."
            )
        if self.norm not in ("pre", "post"):
            raise InputError(f"SASRecConfig expected norm to be 'pre' or 'post', got {self.norm!r}.")

    def build(self) -> "SASRec":
        """A model of these sizes with random weights."""
        return SASRec(self)


class CausalAttention(nn.Module):
    """Multi-head self attention in which every position sees itself and what precedes it in its row."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.qkv = scaled_linear(config.d_model, 3 * config.d_model)
        self.out = scaled_linear(config.d_model, config.d_model)
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.scale = (config.d_model // config.num_heads) ** -0.5

    def forward(self, x: Tensor, batch: SeqBatch) -> Tensor:
        """[T, D] -> [T, D]."""
        attended = ops.jagged_self_attention(
            rearrange(self.qkv(x), "t (three h d) -> t three h d", three=3, h=self.num_heads),
            batch.offsets,
            max_len=batch.max_len,
            scale=self.scale,
            causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(rearrange(attended, "t h d -> t (h d)"))


class Block(nn.Module):
    """Attention and feed-forward layer; the norm that follows each belongs to it."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.attention = CausalAttention(config)
        self.attention_norm = AddNorm(config.d_model, config.dropout)
        self.feed_forward = FeedForward(config.d_model, config.d_ff, config.dropout)
        self.feed_forward_norm = AddNorm(config.d_model, config.dropout)
        self.is_post_norm = config.norm == "post"

    def forward(self, x: Tensor, stream: Tensor, batch: SeqBatch) -> tuple[Tensor, Tensor]:
        """Takes and returns (normed, residual stream), both [T, D]; with norms behind the sums they are one."""
        x, stream = self.attention_norm(self.attention(x, batch), x if self.is_post_norm else stream)
        return self.feed_forward_norm(self.feed_forward(x), x if self.is_post_norm else stream)


class SASRec(NextItemModel):
    """Item and position embeddings, blocks of causal self attention, and the item embeddings again as output.

    Args:
        config: sizes, with num_items.

    Raises:
        InputError: if the number of items is not known.
    """

    name = "sasrec"

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config, num_dropouts=1 + 4 * config.num_layers)
        self.positions = nn.Parameter(torch.randn(config.max_history, config.d_model) * INITIAL_STD)
        self.input_norm = AddNorm(config.d_model, config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def encode(self, batch: SeqBatch) -> Tensor:
        """See `NextItemModel.encode`."""
        x = self.look_up(batch) + self.rows_of(self.positions, positions_in_rows(batch))
        x, stream = self.input_norm(x, None)
        for block in self.blocks:
            x, stream = block(x, stream, batch)
        return x
