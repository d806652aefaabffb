"""Cross-entropy over a whole catalogue of item vectors, whose scores exist a tile at a time.

The forward keeps a running log-sum-exp over stretches of items; the backward makes the scores again, once for the
queries' gradient and once for the items'. Wherever several programs add to one number each writes its own part, and
the parts are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.library import define
from ops.triton.parts import cdiv, dot, power_of_2

_NUM_PROGRAMS = 256
"""Few rows are shared out over stretches of the catalogue until there are so many programs, two per processor."""

_MAX_WIDTH = 128
"""Columns of vectors that a tile holds; wider vectors take several."""

_MEAN_TILE = 4096
"""Parts of log-sum-exps that the last program of the forward reads at once."""


@triton.jit
def _tile(ptr, places, count, first, width, WIDTH: tl.constexpr):
    """[len(places), WIDTH] columns from `first` on of vectors [count, width]; zeros where there are none."""
    columns = first + tl.arange(0, WIDTH)
    exists = (places < count)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + places.to(tl.int64)[:, None] * width + columns[None, :], mask=exists, other=0.0)


@triton.jit
def _scores(
    queries, items, queries_ptr, items_ptr, excluded_ptr, rows, places, num_rows, num_items, width, scale,
    HAS_EXCLUDED: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """[len(rows), len(places)] fp32, -inf where there is no item to have; the first tiles of both are given."""
    scores = dot(queries, tl.trans(items))
    if not ONE_TILE:
        for first in range(WIDTH, width, WIDTH):
            more_queries = _tile(queries_ptr, rows, num_rows, first, width, WIDTH)
            more_items = _tile(items_ptr, places, num_items, first, width, WIDTH)
            scores += dot(more_queries, tl.trans(more_items))
    visible = places < num_items
    if HAS_EXCLUDED:
        visible = visible & (tl.load(excluded_ptr + places, mask=visible, other=1) == 0)
    return tl.where(visible[None, :], scores * scale, float("-inf"))


@triton.jit
def _grad_scores(scores, lse, target, counts, places, grad_scale):
    """[len(target), len(places)] fp32 gradients of row losses by scaled scores, times grad_scale."""
    grad = tl.exp(scores - lse[:, None]) - tl.where(places[None, :] == target[:, None], 1.0, 0.0)
    # Rows that do not count have the log-sum-exp 0, so that exponentials may be infinite there.
    return tl.where(counts[:, None], grad * grad_scale, 0.0)


@triton.jit
def _catalogue_cross_entropy_fwd_kernel(
    queries_ptr,  # [R, D]
    items_ptr,  # [N, D]
    target_ptr,  # [R] int64
    excluded_ptr,  # [N] bool; read only if HAS_EXCLUDED
    part_ptr,  # [S, R] fp32 out, log-sum-exp of each stretch of items
    picked_ptr,  # [R] fp32 out, the target's score; not written where the target is no item
    num_rows,
    num_items,
    width,
    scale,
    items_per_part,
    HAS_EXCLUDED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_item = part * items_per_part
    end_item = tl.minimum(first_item + items_per_part, num_items)
    queries = _tile(queries_ptr, rows, num_rows, 0, width, WIDTH)
    target = tl.load(target_ptr + rows, mask=rows < num_rows, other=-1)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # sum of exp(score - largest)
    picked = tl.zeros([ROWS], tl.float32)
    for first in range(first_item, end_item, ITEMS):
        places = first + tl.arange(0, ITEMS)
        items = _tile(items_ptr, places, num_items, 0, width, WIDTH)
        scores = _scores(
            queries, items, queries_ptr, items_ptr, excluded_ptr, rows, places, num_rows, num_items, width, scale,
            HAS_EXCLUDED, WIDTH, ONE_TILE,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        picked += tl.sum(tl.where(places[None, :] == target.to(tl.int32)[:, None], scores, 0.0), 1)
        largest = new_largest
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(part_ptr + part.to(tl.int64) * num_rows + rows, shift + tl.log(total), mask=rows < num_rows)
    is_here = (rows < num_rows) & (target >= first_item) & (target < end_item)
    tl.store(picked_ptr + rows, picked, mask=is_here)


@triton.jit
def _catalogue_cross_entropy_mean_kernel(
    part_ptr,  # [S, R] fp32
    picked_ptr,  # [R] fp32, -inf where the target is excluded
    target_ptr,  # [R] int64
    lse_ptr,  # [R] fp32 out, log-sum-exp over all items; 0 for rows that do not count
    loss_ptr,  # [1] fp32 out, mean of the rows that count
    count_ptr,  # [1] fp32 out, number of rows that count, at least 1
    num_rows,
    num_items,
    num_parts,
    ignore_index,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    parts = tl.arange(0, PARTS)
    losses = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        exists = rows < num_rows
        target = tl.load(target_ptr + rows, mask=exists, other=-1)
        at = parts.to(tl.int64)[:, None] * num_rows + rows[None, :]
        part = tl.load(part_ptr + at, mask=(parts < num_parts)[:, None] & exists[None, :], other=float("-inf"))
        largest = tl.max(part, 0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        lse = shift + tl.log(tl.where(exists, tl.sum(tl.exp(part - shift[None, :]), 0), 1.0))
        is_item = exists & (target >= 0) & (target < num_items)
        picked = tl.load(picked_ptr + rows, mask=is_item, other=0.0)
        # Targets on a device are not checked: NaN shows a wrong one without a host synchronisation.
        loss = tl.where(is_item & (picked > float("-inf")), lse - picked, float("nan"))
        counts = exists & (target != ignore_index)
        losses += tl.where(counts, loss, 0.0)
        count += tl.where(counts, 1.0, 0.0)
        tl.store(lse_ptr + rows, tl.where(counts, lse, 0.0), mask=exists)
    num_counting = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(loss_ptr, tl.sum(losses, 0) / num_counting)
    tl.store(count_ptr, num_counting)


@triton.jit
def _catalogue_cross_entropy_bwd_queries_kernel(
    queries_ptr,  # [R, D]
    items_ptr,  # [N, D]
    target_ptr,  # [R] int64
    excluded_ptr,  # [N] bool; read only if HAS_EXCLUDED
    lse_ptr,  # [R] fp32
    count_ptr,  # [1] fp32
    grad_loss_ptr,  # [1] fp32
    part_ptr,  # [S, R, D] fp32 out, each stretch of items' share of the queries' gradient
    num_rows,
    num_items,
    width,
    scale,
    items_per_part,
    ignore_index,
    grad_scale,
    HAS_EXCLUDED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    part = tl.program_id(1)
    own_first = tl.program_id(2) * WIDTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_item = part * items_per_part
    end_item = tl.minimum(first_item + items_per_part, num_items)
    queries = _tile(queries_ptr, rows, num_rows, 0, width, WIDTH)
    target = tl.load(target_ptr + rows, mask=rows < num_rows, other=ignore_index)
    lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=0.0)
    counts = target != ignore_index
    grad = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(first_item, end_item, ITEMS):
        places = first + tl.arange(0, ITEMS)
        items = _tile(items_ptr, places, num_items, 0, width, WIDTH)
        scores = _scores(
            queries, items, queries_ptr, items_ptr, excluded_ptr, rows, places, num_rows, num_items, width, scale,
            HAS_EXCLUDED, WIDTH, ONE_TILE,
        )  # fmt: skip
        grad_scores = _grad_scores(scores, lse, target.to(tl.int32), counts, places, grad_scale)
        if not ONE_TILE:
            items = _tile(items_ptr, places, num_items, own_first, width, WIDTH)
        grad += dot(grad_scores.to(items.dtype), items)
    grad *= scale / grad_scale * tl.load(grad_loss_ptr) / tl.load(count_ptr)
    columns = own_first + tl.arange(0, WIDTH)
    at = (part.to(tl.int64) * num_rows + rows)[:, None] * width + columns[None, :]
    tl.store(part_ptr + at, grad, mask=(rows < num_rows)[:, None] & (columns < width)[None, :])


@triton.jit
def _catalogue_cross_entropy_bwd_items_kernel(
    queries_ptr,  # [R, D]
    items_ptr,  # [N, D]
    target_ptr,  # [R] int64
    excluded_ptr,  # [N] bool; read only if HAS_EXCLUDED
    lse_ptr,  # [R] fp32
    count_ptr,  # [1] fp32
    grad_loss_ptr,  # [1] fp32
    grad_ptr,  # [N, D] out
    num_rows,
    num_items,
    width,
    scale,
    ignore_index,
    grad_scale,
    HAS_EXCLUDED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    own_first = tl.program_id(1) * WIDTH
    places = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    items = _tile(items_ptr, places, num_items, 0, width, WIDTH)
    grad = tl.zeros([ITEMS, WIDTH], tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        queries = _tile(queries_ptr, rows, num_rows, 0, width, WIDTH)
        target = tl.load(target_ptr + rows, mask=rows < num_rows, other=ignore_index)
        lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=0.0)
        scores = _scores(
            queries, items, queries_ptr, items_ptr, excluded_ptr, rows, places, num_rows, num_items, width, scale,
            HAS_EXCLUDED, WIDTH, ONE_TILE,
        )  # fmt: skip
        grad_scores = _grad_scores(scores, lse, target.to(tl.int32), target != ignore_index, places, grad_scale)
        if not ONE_TILE:
            queries = _tile(queries_ptr, rows, num_rows, own_first, width, WIDTH)
        grad += dot(tl.trans(grad_scores.to(queries.dtype)), queries)
    grad *= scale / grad_scale * tl.load(grad_loss_ptr) / tl.load(count_ptr)
    columns = own_first + tl.arange(0, WIDTH)
    at = places.to(tl.int64)[:, None] * width + columns[None, :]
    exists = (places < num_items)[:, None] & (columns < width)[None, :]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=exists)


def _blocks(width: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Tiles of scores and vectors that fit into registers; products of fp32, not on tensor cores, need more."""
    half = dtype != torch.float32
    columns = min(power_of_2(width), _MAX_WIDTH if half else _MAX_WIDTH // 2)
    side, one_tile = 64 if half else 32, columns >= width
    return {
        "ROWS": side, "ITEMS": side, "WIDTH": columns, "ONE_TILE": one_tile,
        "num_warps": 4 if one_tile else 8, "num_stages": 2,
    }  # fmt: skip


def _parts(num_rows: int, num_items: int, rows: int, items: int) -> tuple[int, int]:
    """Number of stretches of the catalogue, and items in each, a multiple of `items`."""
    wanted = max(1, _NUM_PROGRAMS // cdiv(num_rows, rows))
    items_per_part = cdiv(cdiv(num_items, items), wanted) * items
    return cdiv(num_items, items_per_part), items_per_part


def _grad_scale(dtype: torch.dtype) -> float:
    """Power of two by which probabilities are multiplied with vectors: fp16 would lose those of unlikely items."""
    return 32768.0 if dtype == torch.float16 else 1.0


def _forward(
    queries: Tensor, items: Tensor, target: Tensor, excluded: Tensor | None, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, count = _fake_forward(queries, items, target, excluded, scale, ignore_index)
    (num_rows, width), num_items = queries.shape, len(items)
    blocks = _blocks(width, queries.dtype)
    num_parts, items_per_part = _parts(num_rows, num_items, blocks["ROWS"], blocks["ITEMS"])
    part, picked = lse.new_empty(num_parts, num_rows), torch.empty_like(lse)
    _catalogue_cross_entropy_fwd_kernel[(cdiv(num_rows, blocks["ROWS"]), num_parts)](
        queries, items, target, target if excluded is None else excluded, part, picked,
        num_rows, num_items, width, scale, items_per_part, HAS_EXCLUDED=excluded is not None, **blocks,
    )  # fmt: skip
    parts = power_of_2(num_parts, least=1)
    _catalogue_cross_entropy_mean_kernel[(1,)](
        part, picked, target, lse, loss, count, num_rows, num_items, num_parts, ignore_index,
        ROWS=_MEAN_TILE // parts, PARTS=parts, num_warps=8,
    )  # fmt: skip
    return loss, lse, count


def _fake_forward(
    queries: Tensor, items: Tensor, target: Tensor, excluded: Tensor | None, scale: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss, count = (queries.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, queries.new_empty(queries.shape[0], dtype=torch.float32), count


def _backward(
    grad_loss: Tensor,
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    excluded: Tensor | None,
    lse: Tensor,
    count: Tensor,
    scale: float,
    ignore_index: int,
    of_queries: bool,
    of_items: bool,
) -> tuple[Tensor, Tensor]:
    (num_rows, width), num_items = queries.shape, len(items)
    blocks, grad_scale = _blocks(width, queries.dtype), _grad_scale(queries.dtype)
    given = queries, items, target, target if excluded is None else excluded, lse, count, grad_loss
    grad_queries, grad_items = queries.new_empty(0), items.new_empty(0)
    if of_queries:
        num_parts, items_per_part = _parts(num_rows, num_items, blocks["ROWS"], blocks["ITEMS"])
        part = lse.new_empty(num_parts, num_rows, width)
        grid = cdiv(num_rows, blocks["ROWS"]), num_parts, cdiv(width, blocks["WIDTH"])
        _catalogue_cross_entropy_bwd_queries_kernel[grid](
            *given, part, num_rows, num_items, width, scale, items_per_part, ignore_index, grad_scale,
            HAS_EXCLUDED=excluded is not None, **blocks,
        )  # fmt: skip
        grad_queries = part.sum(0).to(queries.dtype)
    if of_items:
        grad_items = torch.empty_like(items)
        _catalogue_cross_entropy_bwd_items_kernel[(cdiv(num_items, blocks["ITEMS"]), cdiv(width, blocks["WIDTH"]))](
            *given, grad_items, num_rows, num_items, width, scale, ignore_index, grad_scale,
            HAS_EXCLUDED=excluded is not None, **blocks,
        )  # fmt: skip
    return grad_queries, grad_items


def _fake_backward(
    grad_loss: Tensor,
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    excluded: Tensor | None,
    lse: Tensor,
    count: Tensor,
    scale: float,
    ignore_index: int,
    of_queries: bool,
    of_items: bool,
) -> tuple[Tensor, Tensor]:
    grad_queries = queries.new_empty(queries.shape if of_queries else 0)
    return grad_queries, items.new_empty(items.shape if of_items else 0)


FORWARD = define(
    "catalogue_cross_entropy(Tensor queries, Tensor items, Tensor target, Tensor? excluded, float scale, "
    "int ignore_index) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "catalogue_cross_entropy_backward(Tensor grad_loss, Tensor queries, Tensor items, Tensor target, "
    "Tensor? excluded, Tensor lse, Tensor count, float scale, int ignore_index, bool of_queries, bool of_items) "
    "-> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _CatalogueCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        items: Tensor,
        target: Tensor,
        excluded: Tensor | None,
        scale: float,
        ignore_index: int,
    ) -> Tensor:
        loss, lse, count = FORWARD(queries, items, target, excluded, scale, ignore_index)
        ctx.save_for_backward(queries, items, target, excluded, lse, count)
        ctx.settings = scale, ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        grads = BACKWARD(grad_loss, *ctx.saved_tensors, *ctx.settings, *wanted)
        grad_queries, grad_items = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return grad_queries, grad_items, None, None, None, None


def catalogue_cross_entropy(
    queries: Tensor, items: Tensor, target: Tensor, scale: float, excluded: Tensor | None, ignore_index: int
) -> Tensor:
    """See `ops.catalogue_cross_entropy`."""
    return _CatalogueCrossEntropy.apply(
        queries.contiguous(),
        items.contiguous(),
        target.contiguous(),
        None if excluded is None else excluded.contiguous(),
        scale,
        ignore_index,
    )
