"""Boundaries of packed rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """How the rows of a batch lie in a packed [T, ...] tensor.

    Attributes:
        offsets: [B+1] int32.
        max_len: no row is longer.
    """

    offsets: Tensor
    max_len: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_one_length(cls, num_rows: int, length: int, *, device: torch.device) -> "Rows":
        """Rows that all have `length` tokens."""
        return cls(torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length, length)
