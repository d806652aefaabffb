"""Feature matrices of any length, read in slices of rows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.schemas import InputError

HALF = (torch.float16, torch.bfloat16)


class FeatureMatrix(Protocol):
    """A [N, D] matrix read in slices of rows: a Tensor on any device, an array, or a memory map."""

    @property
    def shape(self) -> Any:
        """(N, D)."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Some of the rows."""


def to_tensor(block: Any) -> Tensor:
    """The rows in their own half precision, else in fp32."""
    if isinstance(block, Tensor):
        return block if block.dtype in HALF else block.float()
    # numpy copies, since torch cannot hold the read-only pages of a memory map.
    return torch.from_numpy(np.array(block, dtype=np.float16 if block.dtype == np.float16 else np.float32))


class RowBlocks:
    """Blocks of a feature matrix as fp32 rows on a device, each checked and passed through a function.

    Memory holds a block at a time, whatever the length of the matrix.

    Args:
        features: [N, D_in], N at least 1.
        block_rows: rows read at once.
        device: where the blocks are wanted.
        transform: applied to each block, [B, D_in] -> [B, D].
        item_keys: of the rows, to be named in errors.

    Raises:
        InputError: if the matrix has no rows; reading raises it for rows that hold NaN or infinity.
    """

    def __init__(
        self,
        features: FeatureMatrix,
        *,
        block_rows: int,
        device: torch.device | str = "cpu",
        transform: Callable[[Tensor], Tensor] | None = None,
        item_keys: Sequence[str] | None = None,
    ) -> None:
        if len(features.shape) != 2 or features.shape[0] == 0:
            raise InputError(f"item features expected a non-empty [N, D] matrix, got shape {list(features.shape)}.")
        if block_rows < 1:
            raise InputError(f"block_rows expected at least 1, got {block_rows}.")
        self.num_rows = int(features.shape[0])
        self._features, self._block_rows, self._item_keys = features, block_rows, item_keys
        self._device, self._transform = torch.device(device), transform

    def through(self, function: Callable[[Tensor], Tensor]) -> "RowBlocks":
        """The same rows, passed through a further function."""
        first = self._transform
        return RowBlocks(
            self._features,
            block_rows=self._block_rows,
            device=self._device,
            transform=function if first is None else lambda rows: function(first(rows)),
            item_keys=self._item_keys,
        )

    def __iter__(self) -> Iterator[Tensor]:
        """All blocks in order."""
        for begin in range(0, self.num_rows, self._block_rows):
            yield self._transformed(self._read(begin))

    def shuffled(self, seed: int | list[int]) -> Iterator[Tensor]:
        """All blocks in an order drawn by the seed; the rows of a block stay in theirs."""
        begins = np.arange(0, self.num_rows, self._block_rows)
        for begin in np.random.default_rng(seed).permutation(begins).tolist():
            yield self._transformed(self._read(begin))

    def sample(self, num_rows: int, seed: int) -> Tensor:
        """Up to num_rows distinct rows in their order, [S, D]; every row is read and checked on the way."""
        chosen = np.arange(self.num_rows)
        if num_rows < self.num_rows:
            chosen = np.sort(np.random.default_rng(seed).choice(self.num_rows, num_rows, replace=False, shuffle=False))
        sample = None
        for begin in range(0, self.num_rows, self._block_rows):
            block = self._read(begin)
            first, last = np.searchsorted(chosen, (begin, begin + len(block)))
            if first < last:
                part = self._transformed(block[torch.from_numpy(chosen[first:last] - begin).to(block.device)])
                # One tensor from the start: parts kept between large blocks would tear the process's memory apart.
                sample = part.new_empty(len(chosen), part.shape[1]) if sample is None else sample
                sample[first:last] = part
        assert sample is not None
        return sample

    def _transformed(self, block: Tensor) -> Tensor:
        return block if self._transform is None else self._transform(block)

    def _read(self, begin: int) -> Tensor:
        block = to_tensor(self._features[begin : begin + self._block_rows]).to(self._device).float()
        if not bool(block.sum().isfinite()):  # large values bring that about too
            self._check_finite(block, begin)
        return block

    def _check_finite(self, block: Tensor, begin: int) -> None:
        broken = (~block.isfinite().all(dim=1)).nonzero()[:, 0]
        if len(broken) > 0:
            row = begin + int(broken[0])
            item = "" if self._item_keys is None else f" (item {self._item_keys[row]!r})"
            raise InputError(
                f"item features expected finite values, got NaN or infinity in row {row}{item}. "
                "Rebuild the item features."
            )
