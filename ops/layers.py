"""Ops of transformer layers that are not attention."""

from torch import Tensor

from ops import checks
from ops.backend import to_autocast_dtype, uses_cpu_path, uses_triton
from ops.cpu.add_rms_norm import add_rms_norm as _add_rms_norm_cpu
from ops.cpu.dropout import dropout as _dropout_cpu
from ops.cpu.relu_feed_forward import relu_feed_forward as _relu_feed_forward_cpu
from ops.reference.add_rms_norm import add_rms_norm as _add_rms_norm
from ops.reference.cross_entropy_small_vocab import cross_entropy_small_vocab as _cross_entropy_small_vocab
from ops.reference.dropout import dropout as _dropout
from ops.reference.relu_feed_forward import relu_feed_forward as _relu_feed_forward
from ops.reference.semantic_id_embedding import semantic_id_embedding as _semantic_id_embedding


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
        (normed, residual + dropout(x)), both [T, D] in the wider of the two inputs' dtypes; statistics fp32.

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
    if uses_triton(x.device.type):
        from ops.triton.add_rms_norm import add_rms_norm as twin

        return twin(x, residual, weight, eps, dropout_p, seed)
    if uses_cpu_path(x.device.type, seed):
        return _add_rms_norm_cpu(x, residual, weight, eps, dropout_p)
    return _add_rms_norm(x, residual, weight, eps, dropout_p, seed)


def relu_feed_forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, *, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """dropout(relu(x @ w_in.T)) @ w_out.T, T5's feed-forward layer without biases.

    Args:
        x: [T, D].
        w_in: [F, D].
        w_out: [D, F].
        dropout_p: on the hidden layer; 0 switches it off.
        seed: [1] int64 that fixes the mask, or None to draw one.

    Returns:
        [T, D] in the autocast dtype, or x's.

    Raises:
        ValueError: if the shapes disagree or dropout_p is outside [0, 1).
    """
    checks.check_rank("relu_feed_forward", "x", x, "T, D")
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[1] or w_out.shape != w_in.shape[::-1]:
        raise ValueError(
            f"ops.relu_feed_forward expected w_in [F, {x.shape[1]}] and w_out [{x.shape[1]}, F] for x "
            f"{checks.shape_of(x)}, got {checks.shape_of(w_in)} and {checks.shape_of(w_out)}."
        )
    checks.check_dropout("relu_feed_forward", dropout_p)
    x, w_in, w_out = to_autocast_dtype(x, w_in, w_out)
    if uses_cpu_path(x.device.type, seed):
        return _relu_feed_forward_cpu(x, w_in, w_out, dropout_p)
    return _relu_feed_forward(x, w_in, w_out, dropout_p, seed)


def semantic_id_embedding(codes: Tensor, table: Tensor, level_offsets: Tensor) -> Tensor:
    """Rows of the token table for the codes of each level: table[codes[:, l] + level_offsets[l]].

    Args:
        codes: [B, L] int64, counted from 0 in every level.
        table: [num_tokens, D].
        level_offsets: [L] int64, first token of each level.

    Returns:
        [B, L, D] in the table's dtype.

    Raises:
        ValueError: if the shapes disagree.
    """
    op = "semantic_id_embedding"
    checks.check_rank(op, "codes", codes, "B, L")
    checks.check_rank(op, "table", table, "num_tokens, D")
    checks.check_index_dtype(op, "codes", codes)
    if level_offsets.shape != codes.shape[1:]:
        raise ValueError(
            f"ops.{op} expected level_offsets [{codes.shape[1]}] for codes {checks.shape_of(codes)}, "
            f"got {checks.shape_of(level_offsets)}."
        )
    return _semantic_id_embedding(codes, table, level_offsets)


def cross_entropy_small_vocab(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each row, in fp32.

    Args:
        logits: [B, K].
        target: [B] int64 in 0..K-1 or ignore_index.
        ignore_index: rows with this target count 0.
        label_smoothing: share of the target that is spread evenly over all K classes.

    Returns:
        [B] fp32 (fp64 for fp64 logits), not averaged.

    Raises:
        ValueError: if the shapes disagree.
    """
    op = "cross_entropy_small_vocab"
    checks.check_rank(op, "logits", logits, "B, K")
    checks.check_index_dtype(op, "target", target)
    if target.shape != logits.shape[:1]:
        raise ValueError(f"ops.{op} expected target [{len(logits)}], got {checks.shape_of(target)}.")
    return _cross_entropy_small_vocab(logits, target, ignore_index, label_smoothing)
