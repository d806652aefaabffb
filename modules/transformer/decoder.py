"""The decoder stack: teacher-forced over whole targets, or step by step over beams."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modules.transformer.attention import CrossAttention, RelativeBias, SelfAttention
from modules.transformer.beam_cache import BeamCache
from modules.transformer.layers import AddNorm, FeedForward, FinalNorm
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes


@dataclass(eq=False)
class DecoderState:
    """What generation keeps between steps. Nothing in it is copied per beam or reordered.

    Attributes:
        cross_kv: [layers, T, 2, H, D] keys and values of the encoded rows.
        encoded_rows: their B rows.
        beams: keys and values of the steps so far, and the ancestry of the beams.
    """

    cross_kv: Tensor
    encoded_rows: Rows
    beams: BeamCache

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.encoded_rows)

    def fork(self) -> "DecoderState":
        """A second future of the same past; see `BeamCache.fork`."""
        return replace(self, beams=self.beams.fork())


class DecoderLayer(nn.Module):
    """Pre-norm causal self attention, cross attention and feed-forward layer."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.attention_norm = AddNorm(sizes.d_model, sizes.dropout)
        self.attention = SelfAttention(sizes)
        self.cross_attention_norm = AddNorm(sizes.d_model, sizes.dropout)
        self.cross_attention = CrossAttention(sizes)
        self.feed_forward_norm = AddNorm(sizes.d_model, sizes.dropout)
        self.feed_forward = FeedForward(sizes.d_model, sizes.d_ff, sizes.dropout)

    def forward(
        self, x: Tensor, residual: Tensor | None, rows: Rows, bias: RelativeBias, kv: Tensor, encoded_rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns (a sub-layer's output that is not yet added, residual stream), both [T, D]."""
        x, residual = self.attention_norm(x, residual)
        x, residual = self.cross_attention_norm(self.attention(x, rows, bias), residual)
        x, residual = self.feed_forward_norm(self.cross_attention(x, rows, kv, encoded_rows), residual)
        return self.feed_forward(x), residual

    def step(self, x: Tensor, residual: Tensor | None, state: DecoderState, layer: int) -> tuple[Tensor, Tensor]:
        """As `forward`, on [B * W, D] newest positions of the beams."""
        num_rows, num_beams, _ = state.beams.ancestors.shape
        unpack = partial(rearrange, pattern="(b w) d -> b w d", b=num_rows, w=num_beams)
        pack = partial(rearrange, pattern="b w d -> (b w) d")
        x, residual = self.attention_norm(x, residual)
        x = self.attention.step(unpack(x), state.beams, layer)
        x, residual = self.cross_attention_norm(pack(x), residual)
        x = self.cross_attention.step(unpack(x), state.cross_kv[layer], state.encoded_rows)
        x, residual = self.feed_forward_norm(pack(x), residual)
        return self.feed_forward(x), residual


class Decoder(nn.Module):
    """Causal T5 decoder with cross attention.

    Args:
        num_layers: depth.
        sizes: of every layer.
    """

    def __init__(self, num_layers: int, sizes: StackSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.bias = RelativeBias(sizes, causal=True)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(num_layers))
        kv_width = 2 * sizes.num_heads * sizes.head_dim
        self.cross_kv = nn.Parameter(torch.randn(num_layers, kv_width, sizes.d_model) * sizes.d_model**-0.5)
        self.final_norm = FinalNorm(sizes.d_model, sizes.dropout)

    def forward(self, x: Tensor, encoded: Tensor, encoded_rows: Rows) -> Tensor:
        """Hidden states of all positions of targets of one length.

        Args:
            x: [B, L, D] embeddings.
            encoded: [T, D] encoder output.
            encoded_rows: its B rows.

        Returns:
            [B, L, D].
        """
        rows = Rows.of_one_length(*x.shape[:2], device=x.device)
        y, residual = rearrange(x, "b l d -> (b l) d"), None
        cross_kv = self._cross_kv(encoded, one_product=encoded.device.type != "cpu")
        for layer, kv in zip(self.layers, cross_kv, strict=True):
            y, residual = layer(y, residual, rows, self.bias, kv, encoded_rows)
        return self.final_norm(y, residual).view(x.shape)

    def _cross_kv(self, encoded: Tensor, *, one_product: bool) -> Iterable[Tensor]:
        """[T, 2, H, D] keys and values for every layer.

        One product saves launches. A processor projects a layer when it is its turn, which is faster: keys and values
        lie together then, and are still in cache, as are their gradients.
        """
        if one_product:
            products = F.linear(encoded, self.cross_kv.flatten(0, 1))
            layers = len(self.cross_kv)
            yield from rearrange(products, "t (l two h d) -> l t two h d", l=layers, two=2, h=self.num_heads).unbind()
        else:
            for weight in self.cross_kv:
                yield rearrange(F.linear(encoded, weight), "t (two h d) -> t two h d", two=2, h=self.num_heads)

    def start(self, encoded: Tensor, encoded_rows: Rows, *, num_steps: int) -> DecoderState:
        """Cross keys and values of all layers in one product, and an empty cache for `num_steps` steps."""
        products = torch.matmul(encoded, rearrange(self.cross_kv, "layers kv d -> layers d kv"))
        num_layers = len(self.layers)
        return DecoderState(
            cross_kv=rearrange(products, "layers t (two h d) -> layers t two h d", two=2, h=self.num_heads),
            encoded_rows=encoded_rows,
            beams=BeamCache(len(encoded_rows), num_layers, self.bias.of_last(num_steps)),
        )

    def step(self, state: DecoderState, x: Tensor) -> Tensor:
        """[B, W, D] embeddings of the newest position of the beams, whose ancestry is in `state` -> [B, W, D]."""
        y, residual = rearrange(x, "b w d -> (b w) d"), None
        for index, layer in enumerate(cast("Iterable[DecoderLayer]", self.layers)):
            y, residual = layer.step(y, residual, state, index)
        return self.final_norm(y, residual).view(x.shape)
