"""Cross-entropy over a whole catalogue in blocks of rows, whose gradients are made while their scores are at hand."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_MAX_SCORES = 1 << 22
"""Scores held at once, 16 MB in fp32, as far as `_BLOCK_ROWS` allows."""

_BLOCK_ROWS = (32, 96)
"""Fewest and most rows of a block: products with fewer waste the vector unit, more no longer fit the cache."""


class _CatalogueCrossEntropy(Function):
    """Keeps the gradients of the sum of row losses by scaled scores; the backward only multiplies them."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        items: Tensor,
        target: Tensor,
        scale: float,
        excluded: Tensor | None,
        ignore_index: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        rows = (target != ignore_index).nonzero()[:, 0]
        products = _product_dtype(queries.dtype)
        rows_queries, catalogue = queries[rows].to(products), items.to(products)
        wide = torch.promote_types(queries.dtype, torch.float32)
        grads = [
            torch.zeros(tensor.shape, dtype=wide) if want else None
            for tensor, want in zip((rows_queries, items), wanted, strict=True)
        ]
        with torch.autocast("cpu", enabled=False):
            losses = _row_losses(rows_queries, catalogue, target[rows], scale, excluded, *grads, dtype=wide)
        ctx.save_for_backward(rows, *grads)
        ctx.factor, ctx.num_rows, ctx.dtype = scale / max(len(rows), 1), len(queries), queries.dtype
        return losses.sum() / max(len(rows), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_rows, grad_items = ctx.saved_tensors
        factor = grad * ctx.factor
        grad_queries = None
        if grad_rows is not None:
            grad_queries = grad_rows.new_zeros(ctx.num_rows, grad_rows.shape[1], dtype=ctx.dtype)
            grad_queries[rows] = (grad_rows * factor).to(ctx.dtype)
        if grad_items is not None:
            grad_items = (grad_items * factor).to(ctx.dtype)
        return grad_queries, grad_items, None, None, None, None, None


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Processors multiply in bf16, if at all in less than fp32; torch's fp16 products take ten times as long."""
    return torch.float32 if dtype == torch.float16 else dtype


def _row_losses(
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    scale: float,
    excluded: Tensor | None,
    grad_queries: Tensor | None,
    grad_items: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """[R] losses in `dtype`; adds each row's gradient by its scaled scores to the two gradients, where given."""
    hidden = None if excluded is None else excluded.nonzero()[:, 0]
    step = min(max(_MAX_SCORES // len(items), _BLOCK_ROWS[0]), _BLOCK_ROWS[1], max(len(queries), 1))
    buffer, losses = items.new_empty(step, len(items), dtype=dtype), items.new_empty(len(queries), dtype=dtype)
    for begin in range(0, len(queries), step):
        block = slice(begin, begin + step)
        rows, wanted = queries[block], target[block, None]
        scores = _scores(rows, items, scale, hidden, buffer[: len(rows)])
        largest, picked = scores.amax(dim=1), scores.gather(1, wanted)[:, 0]
        probabilities = torch.softmax(scores, dim=1, out=scores)
        # The largest score's probability is 1 / sum(exp(score - largest)).
        losses[block] = largest - probabilities.amax(dim=1).log() - picked
        if grad_queries is None and grad_items is None:
            continue
        grad = probabilities.scatter_add_(1, wanted, probabilities.new_full((), -1.0).expand_as(wanted))
        grad = grad.to(items.dtype)
        if grad_queries is not None:
            grad_queries[block] = grad @ items
        if grad_items is not None:
            _add_product(grad_items, grad.t(), rows)
    return losses


def _scores(queries: Tensor, items: Tensor, scale: float, hidden: Tensor | None, out: Tensor) -> Tensor:
    if out.dtype == items.dtype:
        torch.mm(queries, items.t(), out=out)
    else:
        out.copy_(queries @ items.t())
    out.mul_(scale)
    return out if hidden is None else out.index_fill_(1, hidden, float("-inf"))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b in the total's own, wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def catalogue_cross_entropy(
    queries: Tensor, items: Tensor, target: Tensor, scale: float, excluded: Tensor | None, ignore_index: int
) -> Tensor:
    """See `ops.catalogue_cross_entropy`."""
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (queries, items))
    return _CatalogueCrossEntropy.apply(queries, items, target, scale, excluded, ignore_index, wanted)
