"""Rows of memory-mapped matrices in any order, also of files larger than the machine's memory."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.joined_rows import JoinedRows, RowMatrix

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def is_memory_mapped(matrix: RowMatrix) -> bool:
    """Whether rows are read from a file when they are asked for: a memory map, a view of one, or one joined of such."""
    if isinstance(matrix, JoinedRows):
        return any(_mapping(part) is not None for part in matrix.parts)
    return _mapping(matrix) is not None


def exceeds_memory(matrix: RowMatrix) -> bool:
    """Whether the system cannot be expected to keep a memory-mapped matrix in memory once it was read."""
    return is_memory_mapped(matrix) and 2 * matrix.nbytes > _memory_bytes()


def gather_rows(matrix: RowMatrix, rows: np.ndarray, *, from_disk: bool) -> np.ndarray:
    """[B, D] float32 rows, read in the order in which they lie in the file.

    Args:
        matrix: [N, D] numbers.
        rows: [B] row numbers, none negative.
        from_disk: most of them must come from the disk: the system is asked for all at once. Otherwise it reads one
            after the other, each with megabytes around it, which is quicker only where these stay in memory.
    """
    order = np.argsort(rows)
    if from_disk:
        _ask_for(matrix, rows[order])
    gathered = np.empty((len(rows), matrix.shape[1]), dtype=np.float32)
    gathered[order] = matrix[rows[order]]
    return gathered


def _ask_for(matrix: RowMatrix, rows: np.ndarray) -> None:
    """Have the system begin to read rows, which are in ascending order; nothing where it cannot be asked."""
    whole = [(matrix, rows)] if isinstance(matrix, np.ndarray) else []
    parts = [(part, its) for part, _, its in matrix.located(rows)] if isinstance(matrix, JoinedRows) else whole
    for part, rows_of_part in parts:
        mapping = _mapping(part)
        if mapping is None or not hasattr(mmap, "MADV_WILLNEED") or not part.flags.c_contiguous:
            continue
        start = part.ctypes.data - np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        begins = start + rows_of_part * part.strides[0]
        pages = begins // mmap.PAGESIZE * mmap.PAGESIZE
        for page, length in zip(pages.tolist(), (begins + part.strides[0] - pages).tolist(), strict=True):
            mapping.madvise(mmap.MADV_WILLNEED, page, length)


def _mapping(matrix: Any) -> mmap.mmap | None:
    """What an array, or the array that it is a view of, is mapped by."""
    while isinstance(matrix, np.ndarray | memoryview):
        matrix = matrix.base if isinstance(matrix, np.ndarray) else matrix.obj
    return matrix if isinstance(matrix, mmap.mmap) else None


def _memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_CONTAINER_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit
        return memory
