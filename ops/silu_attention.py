"""Attention without softmax, as HSTU has it."""

from torch import Tensor

from ops import checks
from ops.attention import heads_in_triton
from ops.backend import to_autocast_dtype, uses_cpu_path
from ops.cpu.jagged_silu_attention import jagged_silu_attention as _jagged_silu_attention_cpu
from ops.reference.jagged_silu_attention import jagged_silu_attention as _jagged_silu_attention


def jagged_silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_len: int,
    scale: float,
    normalizer: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Pointwise, causal attention within packed rows (Zhai et al. 2024, "HSTU", equation 2).

    Position i of a row gets the sum over j <= i of silu(scale * q_i k_j + bias[i - j]) v_j / normalizer. There is no
    softmax: the weights of a position need not sum to one, and grow with its number of keys.

    Args:
        q: [T, H, D], floating-point; may be a part of a wider tensor, as k and v may.
        k: [T, H, D] in q's dtype.
        v: [T, H, Dv] in q's dtype.
        offsets: [B+1] int32.
        max_len: no row is longer.
        scale: factor of the products.
        normalizer: divides the output, for instance the longest length that a model is trained with; positive.
        bias: [max_len or more, H] by distance, or None; used in fp32.

    Returns:
        [T, H, Dv] in the autocast dtype, or q's; scores and weights are at least fp32.

    Raises:
        ValueError: on shapes, dtypes or offsets that disagree, or a normalizer that is not positive.
    """
    op = "jagged_silu_attention"
    _check(op, q, k, v, bias, max_len, normalizer)
    checks.check_device(op, q=q, k=k, v=v, offsets=offsets, bias=bias)
    checks.check_offsets(op, "offsets", offsets, len(q))
    checks.check_max_len(op, "max_len", max_len, offsets)
    q, k, v = to_autocast_dtype(q, k, v)
    arguments = (q, k, v, offsets, max_len, scale, normalizer, bias)
    if heads_in_triton(op, q, v):
        from ops.triton.jagged_silu_attention import jagged_silu_attention as twin

        return twin(*arguments)
    if uses_cpu_path(q.device.type, None):
        return _jagged_silu_attention_cpu(*arguments)
    return _jagged_silu_attention(*arguments)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, max_len: int, normalizer: float) -> None:
    checks.check_rank(op, "q", q, "T, H, D")
    one_dtype = q.dtype == k.dtype == v.dtype and q.is_floating_point()
    if k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2] or not one_dtype:
        raise ValueError(
            f"ops.{op} expected q and k [T, H, D] and v [T, H, Dv] of one floating-point dtype, "
            f"got {', '.join(map(checks.shape_of, (q, k, v)))}."
        )
    if bias is not None and (bias.dim() != 2 or bias.shape[1] != q.shape[1] or len(bias) < max_len):
        raise ValueError(
            f"ops.{op} expected bias [at least {max_len} distances, {q.shape[1]} heads], got {checks.shape_of(bias)}."
        )
    if not normalizer > 0.0:
        raise ValueError(f"ops.{op} expected a positive normalizer, got {normalizer}.")
