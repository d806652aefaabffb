"""Causal attention with pointwise SiLU within jagged rows: rows of similar lengths form a block, padded with zeros.

Zeros need no mask here, since a key without a value adds nothing, and no gradient passes through it. Keys ahead of
their query are hidden by the bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.cpu.plans import PlanMemo

_PADDING_TOLERANCE = 0.7
"""A block takes rows down to this share of its longest row's length: fewer blocks are worth some padding."""

_HIDDEN = -1e9
"""Added to the score of a key ahead: SiLU and its derivative are zero there, exactly."""


@dataclass(frozen=True, eq=False)
class _Block:
    """b rows of the batch, padded to n tokens.

    Attributes:
        heads: where the block lies in a padded tensor [P + 1, D].
        length: n.
    """

    heads: slice
    length: int

    def of(self, padded: Tensor) -> Tensor:
        """The part [b * H, n, D] of [P + 1, D], a view."""
        return padded[self.heads].view(-1, self.length, padded.shape[-1])


@dataclass(frozen=True, eq=False)
class _Plan:
    """Blocks that cover all rows, the longest first; one copy in, one copy back.

    Attributes:
        blocks: behind each other.
        source: [P] what every place of the blocks holds, among the heads of T packed tokens and one of zeros.
        place: [T * H] where every head lies in the blocks; P, a place of zeros, for tokens behind the last row.
    """

    blocks: list[_Block]
    source: Tensor
    place: Tensor

    @property
    def longest(self) -> int:
        """Of all rows."""
        return self.blocks[0].length if self.blocks else 0

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [P, D]."""
        return F.pad(packed, (0, 0, 0, 0, 0, 1)).view(-1, packed.shape[-1]).index_select(0, self.source)

    def empty(self, width: int, like: Tensor) -> Tensor:
        """[P + 1, width] for the blocks to be written, and zeros."""
        padded = like.new_empty(len(self.source) + 1, width)
        padded[-1] = 0.0
        return padded

    def pack(self, padded: Tensor, num_heads: int) -> Tensor:
        """[P + 1, D] -> [T, H, D]."""
        return padded.index_select(0, self.place).view(-1, num_heads, padded.shape[-1])


def _plan(offsets: Tensor, num_tokens: int, num_heads: int) -> _Plan:
    lengths, order = offsets.diff().sort(descending=True)
    starts, longest = [], 0
    for position, length in enumerate(lengths.tolist()):
        if position == 0 or length < _PADDING_TOLERANCE * longest:
            starts.append(position)
            longest = length
    blocks, sources, num_places = [], [torch.empty(0, dtype=torch.int64)], 0
    rows = torch.stack([lengths.long(), offsets[:-1][order].long()])
    for own_lengths, own_begins in (part.unbind() for part in rows.tensor_split(starts[1:], dim=1) if part.numel()):
        place = torch.arange(int(own_lengths[0]))
        tokens = (own_begins[:, None] + place).where(place < own_lengths[:, None], num_tokens)
        sources.append((tokens[:, None, :] * num_heads + torch.arange(num_heads)[:, None]).flatten())
        if len(place):
            blocks.append(_Block(slice(num_places, num_places + len(sources[-1])), len(place)))
        num_places += len(sources[-1])
    source = torch.cat(sources)
    place = torch.full(((num_tokens + 1) * num_heads,), num_places).index_copy_(0, source, torch.arange(num_places))
    return _Plan(blocks, source, place[: num_tokens * num_heads])


_plan_of = PlanMemo(_plan)


class _JaggedSiluAttention(Function):
    """Keeps scores and weights of every block; the normalizer divides the output and the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, offsets: Tensor, scale: float, normalizer: float
    ) -> Tensor:
        num_heads = q.shape[1]
        plan = _plan_of(offsets, len(q), num_heads)
        pairs = _bias_of_pairs(bias, plan.longest, q.dtype)
        q, k, v = (plan.pad(x) for x in (q, k, v))
        out = plan.empty(v.shape[-1], v)
        kept: list[Tensor] = []
        for block in plan.blocks:
            scores = torch.bmm(block.of(q), block.of(k).transpose(1, 2)).to(pairs.dtype)
            by_head = scores.unflatten(0, (-1, num_heads))
            torch.add(pairs[:, : block.length, : block.length], by_head, alpha=scale, out=by_head)
            weights = F.silu(scores).to(v.dtype)
            torch.bmm(weights, block.of(v), out=block.of(out))
            kept += [scores, weights]
        ctx.save_for_backward(bias, q, k, v, *kept)
        ctx.plan, ctx.num_heads, ctx.scale, ctx.normalizer = plan, num_heads, scale, normalizer
        return plan.pack(out, num_heads).div_(normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        plan, num_heads = ctx.plan, ctx.num_heads
        bias, q, k, v, *kept = ctx.saved_tensors
        wide = torch.promote_types(grad_out.dtype, torch.float32)
        grad_pairs = None if bias is None else torch.zeros(num_heads, plan.longest, plan.longest, dtype=wide)
        grad_out = plan.pad(grad_out / ctx.normalizer)
        grad_q, grad_k, grad_v = (plan.empty(x.shape[-1], x) for x in (q, k, v))
        for block, scores, weights in zip(plan.blocks, kept[::2], kept[1::2], strict=True):
            block_grad = block.of(grad_out)
            torch.bmm(weights.transpose(1, 2), block_grad, out=block.of(grad_v))
            grad_weights = torch.bmm(block_grad, block.of(v).transpose(1, 2)).to(wide)
            grad_scores = torch.ops.aten.silu_backward(grad_weights, scores)
            if grad_pairs is not None:
                grad_pairs[:, : block.length, : block.length] += grad_scores.unflatten(0, (-1, num_heads)).sum(0)
            grad_scores = grad_scores.mul_(ctx.scale).to(q.dtype)
            torch.bmm(grad_scores, block.of(k), out=block.of(grad_q))
            torch.bmm(grad_scores.transpose(1, 2), block.of(q), out=block.of(grad_k))
        grad_bias = None if grad_pairs is None else _grad_of_bias(grad_pairs, bias)
        return *(plan.pack(grad, num_heads) for grad in (grad_q, grad_k, grad_v)), grad_bias, None, None, None


def _distances(longest: int) -> Tensor:
    """[n, n] places from a query back to a key, negative for keys ahead."""
    places = torch.arange(longest)
    return places[:, None] - places


def _bias_of_pairs(bias: Tensor | None, longest: int, dtype: torch.dtype) -> Tensor:
    """[H or 1, n, n] at least fp32 for the longest rows; shorter ones use its upper left corner."""
    wide, distances = torch.promote_types(dtype, torch.float32), _distances(longest)
    if bias is None:
        pairs = torch.zeros(1, *distances.shape, dtype=wide)
    else:
        pairs = bias.to(wide).t()[:, distances.clamp(min=0)]
    return pairs.masked_fill_(distances < 0, _HIDDEN)


def _grad_of_bias(grad_pairs: Tensor, bias: Tensor) -> Tensor:
    """[H, n, n] -> [num_distances, H]; what keys ahead get is zero."""
    distances = _distances(grad_pairs.shape[-1]).clamp_(min=0).flatten()
    grad_bias = torch.zeros(bias.shape, dtype=grad_pairs.dtype)
    return grad_bias.index_add_(0, distances, grad_pairs.flatten(1).t()).to(bias.dtype)


def jagged_silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_len: int,
    scale: float,
    normalizer: float,
    bias: Tensor | None,
) -> Tensor:
    """See `ops.jagged_silu_attention`; blocks are as long as their longest row, whatever `max_len` allows."""
    return _JaggedSiluAttention.apply(q, k, v, bias, offsets, scale, normalizer)
