"""Attention layers over packed rows.

Scores are scaled by head_dim ** -0.5. T5 leaves the factor out and folds it into the initial query weights instead; the
two start out equal, but AdamW moves all weights at one pace, for which unscaled queries would be eight times too fast.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import ops
from modules.transformer.beam_cache import BeamCache
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes


def scaled_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer without bias whose outputs have the inputs' variance at the start."""
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=in_features**-0.5)
    return linear


class RelativeBias(nn.Module):
    """T5's bias per bucket of relative positions and head, shared by all layers of a stack.

    Args:
        sizes: numbers of buckets and heads, and the distance from which on all positions share a bucket.
        causal: look back only.
    """

    def __init__(self, sizes: StackSizes, *, causal: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(sizes.relative_buckets, sizes.num_heads))
        self.max_distance = sizes.relative_max_distance
        self.causal = causal

    def of_last(self, num_positions: int) -> Tensor:
        """[H, num_positions] bias of the last position's query towards all positions."""
        buckets = _buckets_of_last(num_positions, len(self.table), self.max_distance, self.causal, self.table.device)
        return self.table[buckets].t()


@functools.cache
def _buckets_of_last(
    num_positions: int, num_buckets: int, max_distance: int, causal: bool, device: torch.device
) -> Tensor:
    """Remembered on the device: copying them there at every use would make its host wait. Recorded graphs read it."""
    return ops.relative_buckets(num_positions, num_positions, num_buckets, max_distance, causal)[-1].to(device)


class SelfAttention(nn.Module):
    """Self attention with one product for queries, keys and values."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.qkv = scaled_linear(sizes.d_model, 3 * sizes.num_heads * sizes.head_dim)
        self.out = scaled_linear(sizes.num_heads * sizes.head_dim, sizes.d_model)
        self.num_heads, self.dropout, self.scale = sizes.num_heads, sizes.dropout, sizes.head_dim**-0.5

    def forward(self, x: Tensor, rows: Rows, bias: RelativeBias) -> Tensor:
        """[T, D] normed rows -> [T, D]."""
        attended = ops.jagged_self_attention(
            rearrange(self.qkv(x), "t (three h d) -> t three h d", three=3, h=self.num_heads),
            rows.offsets,
            max_len=rows.max_len,
            scale=self.scale,
            bias_table=bias.table,
            max_distance=bias.max_distance,
            causal=bias.causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(rearrange(attended, "t h d -> t (h d)"))

    def step(self, x: Tensor, beams: BeamCache, layer: int) -> Tensor:
        """[B, W, D] newest positions -> [B, W, D]; their keys and values are added to the cache."""
        weight_q, weight_kv = self.qkv.weight.tensor_split([len(self.qkv.weight) // 3])
        q = rearrange(F.linear(x, weight_q), "b w (h d) -> b w h d", h=self.num_heads)
        attended = ops.beam_self_attention(
            q, beams.write_(layer, x, weight_kv), beams.ancestors, scale=self.scale, bias=beams.bias
        )
        return self.out(rearrange(attended, "b w h d -> b w (h d)"))


class CrossAttention(nn.Module):
    """Attention over the encoder's keys and values, which the decoder projects for all its layers."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.query = scaled_linear(sizes.d_model, sizes.num_heads * sizes.head_dim)
        self.out = scaled_linear(sizes.num_heads * sizes.head_dim, sizes.d_model)
        self.num_heads, self.dropout, self.scale = sizes.num_heads, sizes.dropout, sizes.head_dim**-0.5

    def _project(self, x: Tensor) -> Tensor:
        return rearrange(self.query(x), "... (h d) -> ... h d", h=self.num_heads)

    def forward(self, x: Tensor, rows: Rows, kv: Tensor, encoded_rows: Rows) -> Tensor:
        """[Tq, D] normed rows, [Tk, 2, H, D] keys and values -> [Tq, D]."""
        attended = ops.jagged_attention(
            self._project(x),
            kv,
            rows.offsets,
            encoded_rows.offsets,
            max_q=rows.max_len,
            max_k=encoded_rows.max_len,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(rearrange(attended, "t h d -> t (h d)"))

    def step(self, x: Tensor, kv: Tensor, encoded_rows: Rows) -> Tensor:
        """[B, W, D] newest positions of the beams, [Tk, 2, H, D] keys and values per row -> [B, W, D]."""
        attended = ops.beam_cross_attention(
            self._project(x), kv, encoded_rows.offsets, max_k=encoded_rows.max_len, scale=self.scale
        )
        return self.out(rearrange(attended, "b w h d -> b w (h d)"))
