"""Item features in parquet files, decoded some rows at a time."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data.schemas import InputError

DECODED_ROWS = 65_536
"""Rows decoded at once: a file cannot be entered anywhere, so that small slices are cut from these."""

COLUMNS = ("item_key", "embedding")


class ParquetFeatures:
    """The column `embedding` of files as rows [N, D] fp32, and the column `item_key`, one file behind the other.

    Attributes:
        shape: (N, D); D as the first row has it.

    Raises:
        InputError: if a file is not whole or lacks a column, or there is no row.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._ends = list(accumulate(_num_rows(path) for path in self._files))
        if self._ends[-1] == 0:
            raise InputError(f"{self._files[0]} has no row.")
        first = bisect_right(self._ends, 0)
        self.shape = (self._ends[-1], _width(self._files[first]))
        self._none = np.empty((0, self.shape[1]), np.float32)
        self._first, self._decoded = 0, self._none

    def read(self, begin: int, end: int) -> np.ndarray:
        """Rows begin..end-1 [end - begin, D]; null numbers are NaN (InputError where a row has another width)."""
        pieces = []
        while begin < end:
            if not self._first <= begin < self._first + len(self._decoded):
                self._decoded = self._none  # so that it is not held beside what takes its place
                self._first, self._decoded = begin, self._decode(begin)
            pieces.append(self._decoded[begin - self._first : end - self._first].copy())
            begin += len(pieces[-1])
        return np.concatenate(pieces or [self._none]) if len(pieces) != 1 else pieces[0]

    def read_keys(self, begin: int, end: int) -> list[str]:
        """Item keys of rows begin..end-1 (InputError where one has none)."""
        keys: list[str] = []
        for path, first, last in self._places(begin, end):
            column = _table(path, first, last, ["item_key"])["item_key"]
            if column.null_count():
                raise InputError(f"{path}: {column.null_count()} rows have no item_key. Remove them.")
            keys += column.to_list()
        return keys

    def _decode(self, begin: int) -> np.ndarray:
        """Rows of one file from `begin` on."""
        path, first, last = next(self._places(begin, begin + DECODED_ROWS))
        return _stack(_table(path, first, last, COLUMNS), path, self.shape[1])

    def _places(self, begin: int, end: int) -> Iterator[tuple[Path, int, int]]:
        """Files that rows begin..end-1 lie in, with the first row of each and the one behind the last."""
        end = min(end, self.shape[0])
        while begin < end:
            index = bisect_right(self._ends, begin)
            start = self._ends[index - 1] if index else 0
            stop = min(end, self._ends[index])
            yield self._files[index], begin - start, stop - start
            begin = stop


def _num_rows(path: Path) -> int:
    import polars as pl

    def look() -> int:
        scan = pl.scan_parquet(path, glob=False)
        names = scan.collect_schema().names()
        lacking = [name for name in COLUMNS if name not in names]
        if lacking:
            raise InputError(
                f"{path} lacks the columns {', '.join(lacking)}; its columns: {', '.join(names)}. "
                "Rename them to item_key and embedding."
            )
        return scan.select(pl.len()).collect().item()

    return _reading(path, look)


def _width(path: Path) -> int:
    rows = _table(path, 0, 1, COLUMNS)
    lists = _lists(rows["embedding"], path)
    if not (width := int(lists.list.len().fill_null(0)[0])):
        raise InputError(f"{path}: the embedding of item {rows['item_key'][0]!r} has no numbers.")
    return width


def _table(path: Path, first: int, last: int, columns: Sequence[str]) -> Any:
    """Rows first..last-1 of some columns; item keys as text."""
    import polars as pl

    def look() -> Any:
        table = pl.scan_parquet(path, glob=False).select(columns).slice(first, last - first).collect()
        return table.with_columns(pl.col("item_key").cast(pl.String))

    table = _reading(path, look)
    if len(table) != last - first:
        raise InputError(f"{path} ends before row {last:,}: it has changed since it was opened. Run again.")
    return table


def _reading(path: Path, look: Callable[[], Any]) -> Any:
    import polars as pl

    try:
        return look()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path} is not a whole parquet file ({error}). Write it again.") from error


def _lists(column: Any, path: Path) -> Any:
    import polars as pl

    if not isinstance(column.dtype, pl.List | pl.Array):
        raise InputError(f"{path}: column embedding holds {column.dtype}, expected lists of numbers.")
    return column.cast(pl.List(pl.Float32), strict=False)


def _stack(table: Any, path: Path, width: int) -> np.ndarray:
    """[M, width] fp32 of a table's embeddings, each of that width; null numbers become NaN."""
    lists = _lists(table["embedding"], path)
    lengths = lists.list.len().fill_null(0)
    if (lengths != width).any():
        wrong = table["item_key"].filter(lengths != width).to_list()
        raise InputError(
            f"{path}: {len(wrong)} embeddings do not have {width} numbers, as the first has: {examples(wrong)}. "
            "Give all items embeddings of one width."
        )
    return lists.explode().fill_null(float("nan")).to_numpy().reshape(len(lists), width)


def examples(keys: Sequence[str]) -> str:
    """The first few of some keys, for messages."""
    return ", ".join(map(repr, keys[:3])) + (", ..." if len(keys) > 3 else "")
