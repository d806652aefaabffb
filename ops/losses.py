"""Losses: of codes against their level's logits, of items against a whole catalogue."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ops import checks
from ops.backend import to_autocast_dtype, uses_cpu_path, uses_triton
from ops.cpu.catalogue_cross_entropy import catalogue_cross_entropy as _catalogue_cross_entropy_cpu
from ops.reference.catalogue_cross_entropy import catalogue_cross_entropy as _catalogue_cross_entropy
from ops.reference.cross_entropy_small_vocab import cross_entropy_small_vocab as _cross_entropy_small_vocab

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cross_entropy_small_vocab(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    level_slice: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Cross-entropy of each row, in fp32.

    Args:
        logits: [R, K].
        target: [R] int64 in 0..K-1, counted from the slice's first column, or ignore_index.
        ignore_index: rows with this target count 0 and pass no gradient.
        label_smoothing: share of the target that is spread evenly over all classes of the slice.
        level_slice: (begin, end) columns that take part, all others getting zero gradient. With P pairs, row r takes
            pair r % P: logits [B * P, K] hold the P levels of every example one after the other.

    Returns:
        [R] fp32 (fp64 for fp64 logits), not averaged.

    Raises:
        ValueError: if the shapes disagree, a slice lies outside the logits, R is no multiple of P, label_smoothing is
            outside [0, 1], or a target is beyond its slice (read on a CPU and with OPS_DEBUG=1; elsewhere the
            kernels give such a row the loss NaN).
    """
    op = "cross_entropy_small_vocab"
    checks.check_rank(op, "logits", logits, "R, K")
    checks.check_index_dtype(op, "target", target)
    if target.shape != logits.shape[:1]:
        raise ValueError(f"ops.{op} expected target [{logits.shape[0]}], got {checks.shape_of(target)}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"ops.{op} expected label_smoothing in [0, 1], got {label_smoothing}.")
    checks.check_device(op, logits=logits, target=target)
    slices = _slices(op, logits, level_slice)
    for number, (begin, end) in enumerate(slices):
        own = target[number :: len(slices)]
        checks.check_index_range(op, "target", own, end - begin, allowed=ignore_index)
    if _runs_on_triton(logits):
        from ops.triton.cross_entropy_small_vocab import cross_entropy_small_vocab as twin

        return twin(logits, target, ignore_index, label_smoothing, slices)
    return _cross_entropy_small_vocab(logits, target, ignore_index, label_smoothing, slices)


def catalogue_cross_entropy(
    queries: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    excluded: Tensor | None = None,
    ignore_index: int = -1,
) -> Tensor:
    """Mean cross-entropy of each query's target item among all items, without the [R, N] scores in memory.

    The loss of row r is logsumexp_n(scale * q_r . i_n) - scale * q_r . i_target, the sum over items that are not
    excluded. A processor computes blocks of rows and their gradients in the forward pass. The kernels keep running
    sums over blocks of items, and compute scores again for the gradients; they add up in a fixed order.

    Args:
        queries: [R, D].
        items: [N, D] vectors of the catalogue, of the queries' dtype where autocast does not decide.
        target: [R] int64 item numbers, or ignore_index.
        scale: factor of the products, such as the inverse of a temperature.
        excluded: [N] bool, items that no query may have as its target, such as those not seen in training; None for
            none.
        ignore_index: rows with this target do not count and pass no gradient.

    Returns:
        Mean over the rows that count, fp32 (fp64 for fp64 queries); 0 where no row does. Products take the autocast
        dtype (a processor widens fp16, which it multiplies slowly), the loss is fp32.

    Raises:
        ValueError: if shapes or dtypes disagree, there are no items, or a target is no item or an excluded one (read
            on a CPU and with OPS_DEBUG=1; elsewhere the kernels give NaN).
    """
    op = "catalogue_cross_entropy"
    _check_catalogue(op, queries, items, target, excluded)
    checks.check_index_range(op, "target", target, len(items), allowed=ignore_index)
    if excluded is not None:
        checks.check_not_flagged(op, "target", target, "excluded", excluded, allowed=ignore_index)
    queries, items = to_autocast_dtype(queries, items)
    if queries.dtype != items.dtype:
        raise ValueError(
            f"ops.{op} expected queries and items of one dtype, got {queries.dtype} and {items.dtype}. Convert them, "
            "or use torch.autocast."
        )
    if _runs_on_triton(queries):
        from ops.triton.catalogue_cross_entropy import catalogue_cross_entropy as twin

        return twin(queries, items, target, scale, excluded, ignore_index)
    if uses_cpu_path(queries.device.type, None):
        return _catalogue_cross_entropy_cpu(queries, items, target, scale, excluded, ignore_index)
    return _catalogue_cross_entropy(queries, items, target, scale, excluded, ignore_index)


def _check_catalogue(op: str, queries: Tensor, items: Tensor, target: Tensor, excluded: Tensor | None) -> None:
    checks.check_rank(op, "queries", queries, "R, D")
    if items.dim() != 2 or items.shape[1] != queries.shape[1] or items.shape[0] == 0:
        raise ValueError(
            f"ops.{op} expected items [N, {queries.shape[1]}] with N at least 1 for queries "
            f"{checks.shape_of(queries)}, got {checks.shape_of(items)}."
        )
    checks.check_index_dtype(op, "target", target)
    if target.shape != queries.shape[:1]:
        raise ValueError(f"ops.{op} expected target [{queries.shape[0]}], got {checks.shape_of(target)}.")
    if excluded is not None and (excluded.shape != items.shape[:1] or excluded.dtype != torch.bool):
        raise ValueError(f"ops.{op} expected excluded [{items.shape[0]}] bool, got {checks.shape_of(excluded)}.")
    checks.check_device(op, queries=queries, items=items, target=target, excluded=excluded)


def _runs_on_triton(x: Tensor) -> bool:
    """Whether the kernels take this tensor: float64 always goes to the reference."""
    return uses_triton(x.device.type) and x.dtype in _KERNEL_DTYPES


def _slices(
    op: str, logits: Tensor, level_slice: tuple[int, int] | Sequence[tuple[int, int]] | None
) -> tuple[tuple[int, int], ...]:
    num_rows, num_columns = logits.shape
    if level_slice is None:
        level_slice = (0, num_columns)
    several = len(level_slice) > 0 and not isinstance(level_slice[0], int)
    slices = cast(tuple[tuple[int, int], ...], tuple(level_slice) if several else (level_slice,))
    if num_rows % len(slices) != 0:
        raise ValueError(f"ops.{op} expected a multiple of {len(slices)} rows, one per slice, got {num_rows}.")
    for pair in slices:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= num_columns:
            raise ValueError(
                f"ops.{op} expected level_slice as (begin, end) within the {num_columns} columns of logits, got {pair}."
            )
    return slices
