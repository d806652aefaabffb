"""The random numbers of the Triton kernels in PyTorch: Philox 4x32-10 (Salmon et al. 2011)."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 10


def seeded_keep(seed: Tensor, dropout_p: float, num_rows: int, num_columns: int, plane: int = 0) -> Tensor:
    """The dropout mask that a kernel draws: false with probability `dropout_p`, exact to 1/65536.

    Element (row, column) of a plane takes the 16-bit number `column % 8` of the counter (column // 8, row, plane, 0).

    Args:
        seed: [1] int64.
        dropout_p: in [0, 1).
        num_rows: of the mask.
        num_columns: of the mask.
        plane: tells several masks of one seed apart, such as an attention's heads.

    Returns:
        [num_rows, num_columns] bool on the seed's device.
    """
    device = seed.device
    columns = torch.arange((num_columns + 7) // 8, device=device)[None, :]
    rows = torch.arange(num_rows, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = _philox(seed, (columns, rows, zero + plane, zero))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten(1)[:, :num_columns] >= round(dropout_p * 65536)


def _philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for every counter."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 by 32 bit product, in 64 signed bits: one half of x at a time."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return (high >> 16) & _LOW, ((high << 16) | (low & 0xFFFF)) & _LOW
