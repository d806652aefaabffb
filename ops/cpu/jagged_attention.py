"""Attention within jagged rows: rows of one length, or of similar ones, form a block; everything else stays packed.

Heads are gathered straight from the fused products into blocks [b * H, n, D] and scattered straight back: one copy each
way. A block's scores are small enough to stay in cache. Where what lies is worked out once per batch in a plan.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.cpu.dropout import keep_mask
from ops.cpu.plans import PlanMemo
from ops.reference.relative_buckets import relative_buckets

_MAX_EXACT_GROUPS = 32
"""With at most this many distinct row lengths, every length is a group and nothing is padded."""

_PADDING_TOLERANCE = 0.8
"""Otherwise a group takes rows down to this share of its longest row's length."""


@dataclass(frozen=True)
class _Layout:
    """Where heads lie in packed tensors [T, slots, H, D]: q, k, v in one, or q beside k, v.

    Attributes:
        num_q, num_k: packed queries and keys, those behind the last row included.
        q_slots, kv_slots: 3 and 3, or 1 and 2.
        causal: part of a plan because it hides pairs.
    """

    num_q: int
    num_k: int
    q_slots: int
    kv_slots: int
    num_heads: int
    causal: bool


@dataclass(frozen=True, eq=False)
class _Heads:
    """Rows of a packed tensor, seen as [T * slots * H, D], that make up a block [b * H, n, D].

    Attributes:
        read: rows to read; where a row of the batch is shorter than n, rows of some other token.
        write: rows to write; there, rows of a spare token T behind the last.
        block: (b * H, n).
    """

    read: Tensor
    write: Tensor
    block: tuple[int, int]

    def take(self, packed: Tensor) -> Tensor:
        """[T, slots, H, D] -> [b * H, n, D]."""
        head_dim = packed.shape[-1]
        return packed.view(-1, head_dim).index_select(0, self.read).view(*self.block, head_dim)

    def put_(self, packed: Tensor, block: Tensor) -> None:
        """[b * H, n, D] -> its rows of [T + 1, slots, H, D]."""
        head_dim = packed.shape[-1]
        packed.view(-1, head_dim).index_copy_(0, self.write, block.view(-1, head_dim))


@dataclass(frozen=True, eq=False)
class _Group:
    """b rows of the batch, nq queries and nk keys wide.

    Attributes:
        q, k, v, out: where the heads lie.
        missing: [b, 1, nq, 1] bool queries that do not exist, or None.
        hidden: bool pairs that do not attend, broadcasting to [b, H, nq, nk], or None.
    """

    num_queries: int
    num_keys: int
    q: _Heads
    k: _Heads
    v: _Heads
    out: _Heads
    missing: Tensor | None
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """Groups that cover all rows.

    Attributes:
        used_q, used_k: packed queries and keys that groups write to; those from here on belong to no row.
    """

    groups: list[_Group]
    used_q: int
    used_k: int


def _heads(tokens: Tensor, valid: Tensor | None, num_tokens: int, num_heads: int, slots: int, slot: int) -> _Heads:
    """Heads of `tokens` [b, n] in one slot."""

    def rows(tokens: Tensor) -> Tensor:
        heads = torch.arange(slot * num_heads, (slot + 1) * num_heads)
        return (tokens[:, None, :] * (slots * num_heads) + heads[:, None]).flatten()

    block = (len(tokens) * num_heads, tokens.shape[1])
    if valid is None:
        read = rows(tokens)
        return _Heads(read, read, block)
    return _Heads(rows(tokens.clamp(max=num_tokens - 1)), rows(tokens.where(valid, num_tokens)), block)


def _positions(offsets: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Packed tokens [b, n] of some rows, and which of them exist; None if all do."""
    begins, lengths = offsets[:-1][rows].long(), offsets.diff()[rows]
    position = torch.arange(width)
    valid = position < lengths[:, None]
    return begins[:, None] + position, None if bool(valid.all()) else valid


def _group(offsets_q: Tensor, offsets_k: Tensor, rows: Tensor, max_q: int, max_k: int, layout: _Layout) -> _Group:
    tokens_q, valid_q = _positions(offsets_q, rows, max_q)
    tokens_k, valid_k = _positions(offsets_k, rows, max_k)
    q = (tokens_q, valid_q, layout.num_q, layout.num_heads)
    kv = (tokens_k, valid_k, layout.num_k, layout.num_heads)
    hidden = None if valid_k is None else ~valid_k[:, None, None, :]
    if layout.causal:
        future = torch.ones(max_q, max_k, dtype=torch.bool).triu_(1)
        hidden = future if hidden is None else hidden | future
    return _Group(
        num_queries=max_q,
        num_keys=max_k,
        q=_heads(*q, layout.q_slots, 0),
        k=_heads(*kv, layout.kv_slots, layout.kv_slots - 2),
        v=_heads(*kv, layout.kv_slots, layout.kv_slots - 1),
        out=_heads(*q, 1, 0),
        missing=None if valid_q is None else ~valid_q[:, None, :, None],
        hidden=hidden,
    )


def _row_groups(lengths_q: Tensor, lengths_k: Tensor) -> list[Tensor]:
    """Row numbers of every group."""
    keys, order = (lengths_k.long() * (int(lengths_q.max()) + 1) + lengths_q).sort(descending=True)
    _, sizes = keys.unique_consecutive(return_counts=True)
    if len(sizes) <= _MAX_EXACT_GROUPS:
        return list(order.split(sizes.tolist()))
    starts, longest = [], float("inf")
    for position, length in enumerate(lengths_k[order].tolist()):
        if position == 0 or length < _PADDING_TOLERANCE * longest:
            starts.append(position)
            longest = length
    return list(order.tensor_split(starts[1:]))


def _plan(offsets_q: Tensor, offsets_k: Tensor, layout: _Layout) -> _Plan:
    if len(offsets_q) == 1 or layout.num_q == 0 or layout.num_k == 0:
        return _Plan([], 0, 0)
    lengths_q, lengths_k = offsets_q.diff(), offsets_k.diff()
    groups = [
        _group(offsets_q, offsets_k, rows, int(lengths_q[rows].max()), int(lengths_k[rows].max()), layout)
        for rows in _row_groups(lengths_q, lengths_k)
    ]
    return _Plan(groups, int(offsets_q[-1]), int(offsets_k[-1]))


_plan_of = PlanMemo(_plan)


@dataclass(frozen=True)
class _Options:
    num_heads: int
    scale: float
    max_distance: int
    causal: bool
    dropout_p: float


class _JaggedAttention(Function):
    """softmax(scale q k^T + bias) v per group, keeping the probabilities for the backward pass.

    `kv` is [Tk, 2, H, D] beside `q` [Tq, 1, H, D]; with `q` None it is [T, 3, H, D], queries first. Dropout's factor
    1 / (1 - p) is applied to the output and to the incoming gradient, once for all groups.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor | None, kv: Tensor, bias_table: Tensor | None, plan: _Plan, options: _Options
    ) -> Tensor:
        packed_q = kv if q is None else q
        out = _buffer((len(packed_q), 1, *kv.shape[2:]), kv, plan.used_q)
        bias = None if bias_table is None else bias_table[_buckets(bias_table, plan, options)].permute(2, 0, 1)
        saved: list[Tensor | None] = []
        for group in plan.groups:
            block_q = group.q.take(packed_q)
            block_k, block_v = group.k.take(kv), group.v.take(kv)
            probabilities = _probabilities(block_q, block_k, bias, group, options)
            keep = keep_mask(probabilities.shape, options.dropout_p, kv.device) if options.dropout_p > 0.0 else None
            group.out.put_(out, torch.bmm(_dropped(probabilities, keep).to(block_v.dtype), block_v))
            saved += [block_q, block_k, block_v, probabilities, keep]
        ctx.save_for_backward(bias_table, *saved)
        ctx.plan, ctx.options = plan, options
        ctx.q_shape, ctx.kv_shape = None if q is None else q.shape, kv.shape
        out = out[:-1, 0]
        return out.mul_(1.0 / (1.0 - options.dropout_p)) if options.dropout_p > 0.0 else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        plan, options = ctx.plan, ctx.options
        bias_table, *saved = ctx.saved_tensors
        if options.dropout_p > 0.0:
            grad_out = grad_out * (1.0 / (1.0 - options.dropout_p))
        grad_out = grad_out.contiguous()[:, None]
        grad_kv = _buffer(ctx.kv_shape, grad_out, plan.used_k)
        grad_q = grad_kv if ctx.q_shape is None else _buffer(ctx.q_shape, grad_out, plan.used_q)
        grad_bias = None if bias_table is None else bias_table.new_zeros(options.num_heads, *_extent(plan))
        for index, group in enumerate(plan.groups):
            block_q, block_k, block_v, probabilities, keep = saved[5 * index : 5 * index + 5]
            block_grad = group.out.take(grad_out)
            if group.missing is not None:
                block_grad.unflatten(0, (-1, options.num_heads)).masked_fill_(group.missing, 0.0)
            weights = _dropped(probabilities, keep).to(block_v.dtype)
            group.v.put_(grad_kv, torch.bmm(weights.transpose(1, 2), block_grad))
            grad_weights = torch.bmm(block_grad, block_v.transpose(1, 2)).to(probabilities.dtype)
            grad_scores = torch._softmax_backward_data(
                _dropped(grad_weights, keep), probabilities, -1, probabilities.dtype
            )
            if grad_bias is not None:
                by_head = grad_scores.unflatten(0, (-1, options.num_heads))
                grad_bias[:, : group.num_queries, : group.num_keys] += by_head.sum(0)
            grad_scores = grad_scores.mul_(options.scale).to(block_q.dtype)
            group.q.put_(grad_q, torch.bmm(grad_scores, block_k))
            group.k.put_(grad_kv, torch.bmm(grad_scores.transpose(1, 2), block_q))
        grad_table = None
        if bias_table is not None and grad_bias is not None:
            buckets = _buckets(bias_table, plan, options).flatten()
            grad_table = torch.zeros_like(bias_table).index_add_(0, buckets, grad_bias.flatten(1).t())
        return None if ctx.q_shape is None else grad_q[:-1], grad_kv[:-1], grad_table, None, None


def _buffer(shape: tuple[int, ...], like: Tensor, num_used: int) -> Tensor:
    """[T + 1, ...] whose first tokens groups will write, and zeros; the last token is a spare one."""
    buffer = like.new_empty(shape[0] + 1, *shape[1:])
    buffer[num_used:] = 0.0
    return buffer


def _extent(plan: _Plan) -> tuple[int, int]:
    """Most queries and most keys of any group."""
    return (
        max((group.num_queries for group in plan.groups), default=0),
        max((group.num_keys for group in plan.groups), default=0),
    )


def _buckets(bias_table: Tensor, plan: _Plan, options: _Options) -> Tensor:
    """[nq, nk] of the longest rows; shorter rows use its upper left corner."""
    return relative_buckets(*_extent(plan), len(bias_table), options.max_distance, options.causal)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, group: _Group, options: _Options) -> Tensor:
    """[b * H, nq, nk] at least fp32; zeros for a query that sees no key."""
    scores = torch.bmm(q, k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    by_head = scores.unflatten(0, (-1, options.num_heads))
    if bias is None:
        scores.mul_(options.scale)
    else:
        torch.add(bias[:, : group.num_queries, : group.num_keys], by_head, alpha=options.scale, out=by_head)
    if group.hidden is None:
        return scores.softmax(-1)
    by_head.masked_fill_(group.hidden, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1)
    probabilities.unflatten(0, (-1, options.num_heads)).masked_fill_(group.hidden, 0.0)
    return probabilities


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def jagged_attention(
    q: Tensor | None,
    kv: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    bias_table: Tensor | None,
    max_distance: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    """See `ops.jagged_attention` and, with q None and kv [T, 3, H, D], `ops.jagged_self_attention`.

    Groups are as long as their longest row, whatever `max_q` and `max_k` allow.
    """
    num_k, kv_slots, num_heads, _ = kv.shape
    num_q, q_slots = (num_k, kv_slots) if q is None else (len(q), 1)
    layout = _Layout(num_q, num_k, q_slots, kv_slots, num_heads, causal)
    return _JaggedAttention.apply(
        None if q is None else q.contiguous()[:, None],
        kv.contiguous(),
        bias_table,
        _plan_of(offsets_q, offsets_k, layout),
        _Options(num_heads, scale, max_distance, causal, dropout_p),
    )
