"""Ops of transformer layers that are not attention."""

import torch
from torch import Tensor

from ops import checks
from ops.backend import autocast_dtype, say_once, to_autocast_dtype, uses_cpu_path, uses_triton
from ops.cpu.add_rms_norm import add_rms_norm as _add_rms_norm_cpu
from ops.cpu.dropout import dropout as _dropout_cpu
from ops.cpu.relu_feed_forward import relu_feed_forward as _relu_feed_forward_cpu
from ops.cpu.semantic_id_embedding import semantic_id_embedding as _semantic_id_embedding_cpu
from ops.reference.add_rms_norm import add_rms_norm as _add_rms_norm
from ops.reference.dropout import dropout as _dropout
from ops.reference.relu_feed_forward import relu_feed_forward as _relu_feed_forward
from ops.reference.semantic_id_embedding import semantic_id_embedding as _semantic_id_embedding

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NORM_WIDTH = 16384
"""A program of the norm's kernels holds a whole row."""


def dropout(x: Tensor, *, dropout_p: float, seed: Tensor | None = None) -> Tensor:
    """Zero each element with probability `dropout_p` and scale the rest by 1 / (1 - dropout_p).

    The same as torch's dropout with a cheaper random mask; the probability is exact to 1/65536.

    Args:
        x: any shape, floating point.
        dropout_p: 0 switches it off, as in evaluation.
        seed: [1] int64 that fixes the mask, or None to draw one.

    Raises:
        ValueError: if dropout_p is outside [0, 1).
    """
    checks.check_dropout("dropout", dropout_p)
    checks.check_device("dropout", x=x, seed=seed)
    if _runs_on_triton(x):
        from ops.triton.dropout import dropout as twin

        return twin(x, dropout_p, seed)
    if uses_cpu_path(x.device.type, seed):
        return _dropout_cpu(x, dropout_p)
    return _dropout(x, dropout_p, seed)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition, dropout and T5's norm (Zhang and Sennrich 2019: no mean, no bias) in one op.

    Args:
        x: [T, D] output of a sub-layer, to which dropout applies.
        residual: [T, D], or None for zeros.
        weight: [D].
        eps: added to the mean square.
        dropout_p: 0 switches dropout off.
        seed: [1] int64 that fixes the mask, or None to draw one.

    Returns:
        (normed, residual + dropout(x)), both [T, D] in the wider of the two inputs' dtypes; statistics fp32. Under
        autocast normed is in its dtype, that of the product which comes next.

    Raises:
        ValueError: if the shapes disagree or dropout_p is outside [0, 1).
    """
    checks.check_rank("add_rms_norm", "x", x, "T, D")
    if (residual is not None and residual.shape != x.shape) or weight.shape != x.shape[1:]:
        got = "None" if residual is None else checks.shape_of(residual)
        raise ValueError(
            f"ops.add_rms_norm expected residual of x's shape {checks.shape_of(x)} and weight [{x.shape[1]}], "
            f"got residual {got} and weight {checks.shape_of(weight)}."
        )
    checks.check_dropout("add_rms_norm", dropout_p)
    checks.check_device("add_rms_norm", x=x, residual=residual, weight=weight, seed=seed)
    stream_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed_dtype = autocast_dtype(x.device.type, stream_dtype)
    if _runs_on_triton(x, residual, weight) and _fits_norm_kernel(x.shape[1]):
        from ops.triton.add_rms_norm import add_rms_norm as twin

        return twin(x, residual, weight, eps, dropout_p, seed, normed_dtype)
    if uses_cpu_path(x.device.type, seed):
        return _add_rms_norm_cpu(x, residual, weight, eps, dropout_p, normed_dtype)
    return _add_rms_norm(x, residual, weight, eps, dropout_p, seed, normed_dtype)


def relu_feed_forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """dropout(relu(x @ w_in.T)) @ w_out.T, T5's feed-forward layer without biases.

    Args:
        x: [T, D].
        w_in: [F, D], of x's dtype where autocast does not decide.
        w_out: [D, F], likewise.
        dropout_p: on the hidden layer; 0 switches it off.
        seed: [1] int64 that fixes the mask, or None to draw one.

    Returns:
        [T, D] in the autocast dtype, or x's.

    Raises:
        ValueError: if shapes or dtypes disagree or dropout_p is outside [0, 1).
    """
    checks.check_rank("relu_feed_forward", "x", x, "T, D")
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[1] or w_out.shape != w_in.shape[::-1]:
        raise ValueError(
            f"ops.relu_feed_forward expected w_in [F, {x.shape[1]}] and w_out [{x.shape[1]}, F] for x "
            f"{checks.shape_of(x)}, got {checks.shape_of(w_in)} and {checks.shape_of(w_out)}."
        )
    checks.check_dropout("relu_feed_forward", dropout_p)
    checks.check_device("relu_feed_forward", x=x, w_in=w_in, w_out=w_out, seed=seed)
    x, w_in, w_out = to_autocast_dtype(x, w_in, w_out)
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(
            f"ops.relu_feed_forward expected x, w_in and w_out of one dtype, got {x.dtype}, {w_in.dtype} and "
            f"{w_out.dtype}. Convert them, or use torch.autocast."
        )
    if _runs_on_triton(x):
        from ops.triton.relu_feed_forward import relu_feed_forward as twin

        return twin(x, w_in, w_out, dropout_p, seed)
    if uses_cpu_path(x.device.type, seed):
        return _relu_feed_forward_cpu(x, w_in, w_out, dropout_p)
    return _relu_feed_forward(x, w_in, w_out, dropout_p, seed)


def semantic_id_embedding(
    codes: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    *,
    positions: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Rows of the token table for the codes of each level: table[codes[:, l] + level_offsets[l]] + positions[l].

    Codes below 0, as in rows without a target, read as zeros and pass no gradient, to positions neither.

    Args:
        codes: [B, L] int64, counted from 0 in every level.
        table: [num_tokens, D].
        level_offsets: [L] int64, first token of each level.
        positions: [L, D] added to the levels, or None.
        deterministic: whether a kernel's gradient adds up in a fixed order; False is faster. PyTorch takes no notice.

    Returns:
        [B, L, D] in the table's dtype. Gradients add up in fp32.

    Raises:
        ValueError: if the shapes disagree, or a code is beyond the table (read on a CPU and with OPS_DEBUG=1;
            elsewhere such a code reads as zeros).
    """
    op = "semantic_id_embedding"
    checks.check_rank(op, "codes", codes, "B, L")
    checks.check_rank(op, "table", table, "num_tokens, D")
    checks.check_index_dtype(op, "codes", codes)
    checks.check_index_dtype(op, "level_offsets", level_offsets)
    if level_offsets.shape != codes.shape[1:]:
        raise ValueError(
            f"ops.{op} expected level_offsets [{codes.shape[1]}] for codes {checks.shape_of(codes)}, "
            f"got {checks.shape_of(level_offsets)}."
        )
    if positions is not None and positions.shape != (codes.shape[1], table.shape[1]):
        raise ValueError(
            f"ops.{op} expected positions [{codes.shape[1]}, {table.shape[1]}], got {checks.shape_of(positions)}."
        )
    checks.check_device(op, codes=codes, table=table, level_offsets=level_offsets, positions=positions)
    checks.check_level_codes(op, codes, level_offsets, len(table))
    if _runs_on_triton(table, positions):
        from ops.triton.semantic_id_embedding import semantic_id_embedding as twin

        return twin(codes, table, level_offsets, positions, deterministic)
    if uses_cpu_path(table.device.type, None):
        return _semantic_id_embedding_cpu(codes, table, level_offsets, positions, deterministic)
    return _semantic_id_embedding(codes, table, level_offsets, positions, deterministic)


def _runs_on_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: float64 always goes to the reference."""
    given = [tensor for tensor in tensors if tensor is not None]
    return uses_triton(given[0].device.type) and all(tensor.dtype in _KERNEL_DTYPES for tensor in given)


def _fits_norm_kernel(width: int) -> bool:
    if width <= _MAX_NORM_WIDTH:
        return True
    say_once(
        f"ops.add_rms_norm runs in PyTorch for rows of {width} elements: its kernels take up to {_MAX_NORM_WIDTH}."
    )
    return False
