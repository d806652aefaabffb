"""Several matrices of one width read as one, each left where it is: the features of data sets trained on together."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from data.schemas import InputError


class RowMatrix(Protocol):
    """A [N, D] matrix read by slices and by arrays of row numbers: an array, a memory map, or `JoinedRows`."""

    @property
    def shape(self) -> Any:
        """(N, D)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the rows."""

    @property
    def nbytes(self) -> int:
        """Of all rows together."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class JoinedRows:
    """Matrices below each other as one [N, D] matrix; only the rows that are asked for are read.

    A slice inside one part is a view of it where the types agree; everything else is a copy of the wanted rows.

    Args:
        parts: [N_i, D] arrays or memory maps of numbers.
        names: of the parts, to be named in errors.

    Attributes:
        parts: as given.
        offsets: [P+1] int64: part p holds the rows from offsets[p] up to offsets[p + 1].

    Raises:
        InputError: if there is no part, or the parts are no matrices of one width.
    """

    def __init__(self, parts: Sequence[np.ndarray], *, names: Sequence[str] | None = None) -> None:
        if not parts:
            raise InputError("JoinedRows expected at least one matrix, got none.")
        _check_widths(parts, names or [f"part {number}" for number in range(len(parts))])
        self.parts = tuple(parts)
        self.offsets = np.cumsum([0, *(len(part) for part in parts)])
        self._dtype = np.result_type(*(part.dtype for part in parts))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return int(self.offsets[-1]), self.parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that holds the numbers of every part."""
        return self._dtype

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def nbytes(self) -> int:
        """Of all rows together."""
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray | Sequence[int]) -> np.ndarray:
        """[M, D] rows, by a slice or by row numbers, of which negative ones count from the end.

        Raises:
            IndexError: for row numbers beyond the matrix, and for what is neither slice nor a list of integers.
        """
        if isinstance(rows, slice):
            begin, end, step = rows.indices(len(self))
            return self._range(begin, max(begin, end)) if step == 1 else self._gather(np.arange(begin, end, step))
        return self._gather(self._row_numbers(np.asarray(rows)))

    def located(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Each part that holds some of the rows, the places of these among the rows, and their numbers in the part.

        Args:
            rows: [M] row numbers, none negative.
        """
        part_of = np.searchsorted(self.offsets, rows, side="right") - 1
        for number in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == number)
            yield self.parts[number], places, rows[places] - self.offsets[number]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """All rows in memory, for who asks for just that."""
        return np.array(self[:], dtype=dtype)

    def _row_numbers(self, rows: np.ndarray) -> np.ndarray:
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and len(rows)):
            raise IndexError(
                f"rows of a JoinedRows are chosen by a slice or by integers [M], got {rows.dtype} "
                f"of shape {list(rows.shape)}."
            )
        rows = rows.astype(np.int64)
        outside = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(outside):
            raise IndexError(f"row {outside[0]} is outside a matrix of {len(self)} rows.")
        return np.where(rows < 0, rows + len(self), rows)

    def _range(self, begin: int, end: int) -> np.ndarray:
        """Rows from begin up to end."""
        first = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end, side="left"))
        pieces = [
            part[max(begin - start, 0) : end - start]
            for part, start in zip(self.parts[first:last], self.offsets[first:last].tolist(), strict=True)
        ]
        if len(pieces) == 1:
            return pieces[0].astype(self._dtype, copy=False)
        return np.concatenate([np.empty((0, self.shape[1]), self._dtype), *pieces])

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, none of them negative."""
        gathered = np.empty((len(rows), self.shape[1]), dtype=self._dtype)
        for part, places, rows_of_part in self.located(rows):
            gathered[places] = part[rows_of_part]
        return gathered


def _check_widths(parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    for name, part in zip(names, parts, strict=True):
        if part.ndim != 2 or part.dtype.kind not in "fiu":
            raise InputError(f"{name} expected a matrix of numbers, got {part.dtype} of shape {list(part.shape)}.")
        if part.shape[1] != parts[0].shape[1]:
            raise InputError(
                f"{name} has features of width {part.shape[1]}, expected {parts[0].shape[1]} as {names[0]} has. "
                "Encode all with the same encoder."
            )


class ChosenRows:
    """Some rows of a matrix as a matrix of their own; only those that are asked for are read.

    Args:
        matrix: [N, D].
        rows: [M] their numbers.
    """

    def __init__(self, matrix: RowMatrix, rows: np.ndarray) -> None:
        self._matrix, self._rows = matrix, rows

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return len(self._rows), self._matrix.shape[1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._matrix[self._rows[rows]]
