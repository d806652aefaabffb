"""HSTU: gated, pointwise attention over the items of a history (Zhai et al. 2024, arXiv 2402.17152, section 3).

Position is a bias by distance alone: the timestamps that the paper's bias also reads are no part of a batch. Products
of queries and keys are scaled by head_dim ** -0.5, which the paper leaves to small initial weights. Norms are
root-mean-square norms, as in the other transformers here, and the loss is over the whole catalogue.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from data.schemas import SeqBatch
from modules.sequential.next_item import NextItemConfig, NextItemModel
from modules.transformer.attention import scaled_linear
from modules.transformer.layers import AddNorm


@dataclass(frozen=True, kw_only=True)
class HSTUConfig(NextItemConfig):
    """Sizes of an HSTU.

    Attributes:
        num_layers: there are no feed-forward layers between them.
        num_heads: of every attention.
        head_dim: of queries and keys.
        value_dim: of values and of the gates that they are multiplied with, per head.
    """

    num_layers: int = 2
    num_heads: int = 4
    head_dim: int = 16
    value_dim: int = 16

    def build(self) -> "HSTU":
        """A model of these sizes with random weights."""
        return HSTU(self)


class HSTULayer(nn.Module):
    """Equations 1 to 3: one product for gates, values, queries and keys, attention, gate, one product back."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        gated, attended = config.num_heads * config.value_dim, config.num_heads * config.head_dim
        self.project = scaled_linear(config.d_model, 2 * gated + 2 * attended)
        self.distance_bias = nn.Parameter(torch.zeros(config.max_history, config.num_heads))
        self.norm = AddNorm(gated, dropout=0.0)
        self.out = scaled_linear(gated, config.d_model)
        self.parts = (gated, gated, attended, attended)
        self.num_heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.normalizer = float(config.max_history)

    def forward(self, x: Tensor, batch: SeqBatch) -> Tensor:
        """[T, D] normed states -> [T, D]."""
        u, v, q, k = F.silu(self.project(x)).split(self.parts, dim=1)
        q, k, v = (part.unflatten(1, (self.num_heads, -1)) for part in (q, k, v))
        attended = ops.jagged_silu_attention(
            q,
            k,
            v,
            batch.offsets,
            max_len=batch.max_len,
            scale=self.scale,
            normalizer=self.normalizer,
            bias=self.distance_bias,
        )
        normed, _ = self.norm(attended.flatten(1), None)
        return self.out(normed * u)


class HSTU(NextItemModel):
    """Item embeddings, layers of pointwise attention, and the item embeddings again as output.

    Args:
        config: sizes, with num_items.

    Raises:
        InputError: if the number of items is not known.
    """

    name = "hstu"

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__(config, num_dropouts=1 + config.num_layers)
        self.input_norm = AddNorm(config.d_model, config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        self.norms = nn.ModuleList(AddNorm(config.d_model, config.dropout) for _ in range(config.num_layers))

    def encode(self, batch: SeqBatch) -> Tensor:
        """See `NextItemModel.encode`."""
        x, stream = self.input_norm(self.look_up(batch), None)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x, stream = norm(layer(x, batch), stream)
        return x
