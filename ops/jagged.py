"""Layout ops on packed (jagged) rows: to a padded block and back."""

from torch import Tensor

from ops import checks
from ops.reference.jagged_to_padded import jagged_to_padded as _jagged_to_padded
from ops.reference.jagged_to_padded import padded_to_jagged as _padded_to_jagged


def jagged_to_padded(x: Tensor, offsets: Tensor, *, max_len: int, pad: float = 0.0) -> Tensor:
    """Packed rows as one padded block.

    Args:
        x: [T, ...] packed rows, any dtype.
        offsets: [B+1] int32.
        max_len: width of the block; no row may be longer.
        pad: value behind the end of each row.

    Returns:
        [B, max_len, ...].

    Raises:
        ValueError: on wrong offsets or a row longer than max_len.
    """
    checks.check_offsets("jagged_to_padded", "offsets", offsets, x.shape[0])
    checks.check_max_len("jagged_to_padded", "max_len", max_len, offsets)
    return _jagged_to_padded(x, offsets, max_len, pad)


def padded_to_jagged(x: Tensor, offsets: Tensor, *, num_tokens: int) -> Tensor:
    """The first positions of each padded row, packed; the inverse of `jagged_to_padded`.

    Args:
        x: [B, max_len, ...], any dtype.
        offsets: [B+1] int32.
        num_tokens: T, equal to offsets[-1].

    Returns:
        [T, ...].

    Raises:
        ValueError: on wrong offsets or a row longer than max_len.
    """
    checks.check_offsets("padded_to_jagged", "offsets", offsets, num_tokens)
    if x.dim() < 2 or len(x) != len(offsets) - 1:
        raise ValueError(
            f"ops.padded_to_jagged expected x of shape [{len(offsets) - 1}, max_len, ...], got {checks.shape_of(x)}."
        )
    checks.check_max_len("padded_to_jagged", "x.shape[1]", x.shape[1], offsets)
    return _padded_to_jagged(x, offsets, num_tokens)
