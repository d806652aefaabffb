"""Ops on packed (jagged) rows: to a padded block and back, row-wise concatenation, and reductions of each row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ops import checks
from ops.backend import uses_triton
from ops.reference.jagged_concat import jagged_concat as _jagged_concat
from ops.reference.jagged_concat import jagged_split as _jagged_split
from ops.reference.jagged_reduce import jagged_mean as _jagged_mean
from ops.reference.jagged_reduce import jagged_sum as _jagged_sum
from ops.reference.jagged_softmax import jagged_softmax as _jagged_softmax
from ops.reference.jagged_to_padded import jagged_to_padded as _jagged_to_padded
from ops.reference.jagged_to_padded import padded_to_jagged as _padded_to_jagged

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jagged_to_padded(x: Tensor, offsets: Tensor, *, max_len: int, pad: float = 0) -> Tensor:
    """Packed rows as one padded block.

    Args:
        x: [T, ...] packed rows, any dtype.
        offsets: [B+1] int32.
        max_len: width of the block; no row may be longer.
        pad: value behind the end of each row.

    Returns:
        [B, max_len, ...] in x's dtype.

    Raises:
        ValueError: on wrong offsets, a row longer than max_len, or a pad that x's dtype cannot hold.
    """
    op = "jagged_to_padded"
    _check_rows(op, x, offsets)
    checks.check_max_len(op, "max_len", max_len, offsets)
    if not _holds(x.dtype, pad):
        raise ValueError(f"ops.{op} expected a pad that fits x {checks.shape_of(x)}, got {pad}.")
    if _copies_in_triton(x):
        from ops.triton.jagged_to_padded import jagged_to_padded as twin

        return twin(x, offsets, max_len, pad)
    return _jagged_to_padded(x, offsets, max_len, pad)


def padded_to_jagged(x: Tensor, offsets: Tensor, *, num_tokens: int) -> Tensor:
    """The first positions of each padded row, packed; the inverse of `jagged_to_padded`.

    Args:
        x: [B, max_len, ...], any dtype.
        offsets: [B+1] int32.
        num_tokens: T, at least offsets[-1]; the rest of the result is zeros.

    Returns:
        [T, ...] in x's dtype.

    Raises:
        ValueError: on wrong offsets or a row longer than max_len.
    """
    op = "padded_to_jagged"
    checks.check_device(op, x=x, offsets=offsets)
    checks.check_offsets(op, "offsets", offsets, num_tokens)
    if x.dim() < 2 or x.shape[0] != offsets.shape[0] - 1:
        raise ValueError(
            f"ops.{op} expected x of shape [{offsets.shape[0] - 1}, max_len, ...], got {checks.shape_of(x)}."
        )
    checks.check_max_len(op, "x.shape[1]", x.shape[1], offsets)
    if _copies_in_triton(x):
        from ops.triton.jagged_to_padded import padded_to_jagged as twin

        return twin(x, offsets, num_tokens)
    return _padded_to_jagged(x, offsets, num_tokens)


def jagged_concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Row-wise concatenation: row b of the result is row b of every part, one behind the other.

    A part with one token per row, such as a user token, has offsets 0, 1, ..., B.

    Args:
        parts: two or more [T_i, ...] of one dtype and width, any dtype.
        offsets: for each part [B+1] int32.

    Returns:
        (packed, offsets): [sum of T_i, ...] and [B+1] int32. The parts' tails end up behind the last row, as zeros.

    Raises:
        ValueError: if the parts differ in number of rows, dtype, width or device, or on wrong offsets.
    """
    op = "jagged_concat"
    _check_parts(op, len(parts), offsets)
    for index, (part, own) in enumerate(zip(parts, offsets, strict=True)):
        if part.dim() == 0 or part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
            raise ValueError(
                f"ops.{op} expected parts [T, ...] of one dtype and width, "
                f"got {checks.shape_of(parts[0])} as part 0 and {checks.shape_of(part)} as part {index}."
            )
        checks.check_device(op, **{"part 0": parts[0], f"part {index}": part, f"offsets of part {index}": own})
        checks.check_offsets(op, f"offsets of part {index}", own, part.shape[0])
    if _copies_in_triton(parts[0]):
        from ops.triton.jagged_concat import jagged_concat as twin

        return twin(parts, offsets)
    return _jagged_concat(parts, offsets)


def jagged_split(x: Tensor, offsets: Sequence[Tensor], *, num_tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """The parts that `jagged_concat` put together.

    Args:
        x: [T, ...] packed rows, any dtype.
        offsets: for each of two or more parts [B+1] int32.
        num_tokens: T_i of each part, at least the last of its offsets; their sum is T.

    Returns:
        For each part [T_i, ...] in x's dtype, with zeros behind its last row.

    Raises:
        ValueError: if the parts differ in number of rows, do not add up to x, or on wrong offsets.
    """
    op = "jagged_split"
    _check_parts(op, len(num_tokens), offsets)
    if x.dim() == 0 or sum(num_tokens) != x.shape[0]:
        raise ValueError(
            f"ops.{op} expected x of shape [{sum(num_tokens)}, ...] for parts of {list(num_tokens)} tokens, "
            f"got {checks.shape_of(x)}."
        )
    for index, (own, num_own) in enumerate(zip(offsets, num_tokens, strict=True)):
        checks.check_device(op, x=x, **{f"offsets of part {index}": own})
        checks.check_offsets(op, f"offsets of part {index}", own, num_own)
    if _copies_in_triton(x):
        from ops.triton.jagged_concat import jagged_split as twin

        return twin(x, offsets, num_tokens)
    return _jagged_split(x, offsets, num_tokens)


def jagged_softmax(x: Tensor, offsets: Tensor, *, max_len: int) -> Tensor:
    """Softmax over the tokens of each row, each column for itself.

    Args:
        x: [T] or [T, H], floating point; statistics are at least fp32.
        offsets: [B+1] int32.
        max_len: no row is longer.

    Returns:
        Of x's shape and dtype; zeros behind the last row.

    Raises:
        ValueError: on a wrong shape or dtype, wrong offsets, or a row longer than max_len.
    """
    op = "jagged_softmax"
    if x.dim() not in (1, 2) or not x.is_floating_point():
        raise ValueError(f"ops.{op} expected x of shape [T] or [T, H], floating point, got {checks.shape_of(x)}.")
    _check_rows(op, x, offsets)
    checks.check_max_len(op, "max_len", max_len, offsets)
    if uses_triton(x.device.type) and x.dtype in _KERNEL_DTYPES:
        from ops.triton.jagged_softmax import jagged_softmax as twin

        return twin(x, offsets, max_len)
    return _jagged_softmax(x, offsets, max_len)


def jagged_sum(x: Tensor, offsets: Tensor, *, max_len: int) -> Tensor:
    """Sum of the tokens of each row; 0 for an empty row.

    Args:
        x: [T, D], floating point; sums are at least fp32.
        offsets: [B+1] int32.
        max_len: no row is longer.

    Returns:
        [B, D] in x's dtype.

    Raises:
        ValueError: on a wrong shape or dtype, wrong offsets, or a row longer than max_len.
    """
    _check_reduction("jagged_sum", x, offsets, max_len)
    if uses_triton(x.device.type) and x.dtype in _KERNEL_DTYPES:
        from ops.triton.jagged_reduce import jagged_sum as twin

        return twin(x, offsets, max_len)
    return _jagged_sum(x, offsets, max_len)


def jagged_mean(x: Tensor, offsets: Tensor, *, max_len: int) -> Tensor:
    """Mean of the tokens of each row; 0 for an empty row.

    Args:
        x: [T, D], floating point; sums are at least fp32.
        offsets: [B+1] int32.
        max_len: no row is longer.

    Returns:
        [B, D] in x's dtype.

    Raises:
        ValueError: on a wrong shape or dtype, wrong offsets, or a row longer than max_len.
    """
    _check_reduction("jagged_mean", x, offsets, max_len)
    if uses_triton(x.device.type) and x.dtype in _KERNEL_DTYPES:
        from ops.triton.jagged_reduce import jagged_mean as twin

        return twin(x, offsets, max_len)
    return _jagged_mean(x, offsets, max_len)


def _copies_in_triton(x: Tensor) -> bool:
    """Whether kernels move this tensor; they know elements of up to 8 bytes."""
    return uses_triton(x.device.type) and x.dtype.itemsize <= 8


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Whether a dtype has the number, or one that is rounded from it."""
    if dtype.is_floating_point or dtype.is_complex:
        return not torch.finfo(dtype).max < abs(number) < math.inf
    lowest, highest = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return lowest <= number <= highest and number == int(number)


def _check_rows(op: str, x: Tensor, offsets: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"ops.{op} expected x of shape [T, ...], got {checks.shape_of(x)}.")
    checks.check_device(op, x=x, offsets=offsets)
    checks.check_offsets(op, "offsets", offsets, x.shape[0])


def _check_reduction(op: str, x: Tensor, offsets: Tensor, max_len: int) -> None:
    checks.check_rank(op, "x", x, "T, D")
    if not x.is_floating_point():
        raise ValueError(f"ops.{op} expected x of a floating-point dtype, got {checks.shape_of(x)}.")
    _check_rows(op, x, offsets)
    checks.check_max_len(op, "max_len", max_len, offsets)


def _check_parts(op: str, num_parts: int, offsets: Sequence[Tensor]) -> None:
    if num_parts < 2 or len(offsets) != num_parts:
        raise ValueError(
            f"ops.{op} expected two or more parts with offsets each, got {num_parts} and {len(offsets)} offsets."
        )
    if len({own.numel() for own in offsets}) > 1:
        rows = ", ".join(str(own.numel() - 1) for own in offsets)
        raise ValueError(f"ops.{op} expected parts with equally many rows, got {rows}.")
