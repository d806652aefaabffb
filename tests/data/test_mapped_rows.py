import mmap

import numpy as np
import pytest

import data.mapped_rows
from data.joined_rows import JoinedRows
from data.mapped_rows import exceeds_memory, gather_rows, is_memory_mapped

WHOLE = np.arange(6000, dtype=np.float16).reshape(2000, 3) % 512
ROWS = np.array([1999, 0, 700, 3, 3, 1365, 1366])


@pytest.fixture
def mapped(tmp_path) -> np.ndarray:
    np.save(tmp_path / "rows.npy", WHOLE)
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


class NotedMap(mmap.mmap):
    """A memory map that notes what of it was asked for."""

    def madvise(self, *advice):
        self.advice = [*getattr(self, "advice", []), advice]
        super().madvise(*advice)


@pytest.fixture
def noted(tmp_path) -> tuple[NotedMap, np.ndarray]:
    """A memory map, and [2000, 3] float16 in it after a head of 64 bytes."""
    (tmp_path / "rows.bin").write_bytes(b"h" * 64 + WHOLE.tobytes())
    with (tmp_path / "rows.bin").open("rb") as file:
        mapping = NotedMap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapping, np.frombuffer(mapping, dtype=np.float16, offset=64).reshape(2000, 3)


def test_memory_maps_are_recognised(mapped, noted):
    for matrix in (mapped, np.asarray(mapped)[2:], JoinedRows([WHOLE, mapped]), noted[1]):
        assert is_memory_mapped(matrix)
    for matrix in (WHOLE, mapped[[1, 2]], np.array(mapped), JoinedRows([WHOLE, WHOLE[2:]])):
        assert not is_memory_mapped(matrix)


@pytest.mark.parametrize("from_disk", [False, True])
def test_gathered_rows_are_those_of_an_array(mapped, noted, from_disk):
    expected = WHOLE[ROWS].astype(np.float32)
    joined = JoinedRows([mapped[:700], WHOLE[700:1000], mapped[1000:]])
    for matrix in (WHOLE, mapped, noted[1], joined, np.asfortranarray(WHOLE)):
        found = gather_rows(matrix, ROWS, from_disk=from_disk)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_the_system_is_asked_for_the_pages_of_all_rows_before_they_are_read(noted, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    mapping, matrix = noted
    gather_rows(matrix, ROWS, from_disk=False)
    assert not hasattr(mapping, "advice")
    gather_rows(matrix, ROWS[:3], from_disk=True)
    # Row r lies at 64 + 6 r: row 0 at 64, row 700 at 4264 and row 1999 at 12058, on the pages 0, 4096 and 8192.
    need = mmap.MADV_WILLNEED
    assert mapping.advice == [(need, 0, 70), (need, 4096, 174), (need, 8192, 3872)]


def test_rows_of_a_part_are_asked_for_where_the_part_lies(noted, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    mapping, matrix = noted
    gather_rows(JoinedRows([WHOLE[:5], matrix[700:]]), np.array([0, 5]), from_disk=True)
    assert mapping.advice == [(mmap.MADV_WILLNEED, 4096, 174)]


def test_what_exceeds_memory(mapped, monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(data.mapped_rows, "_CONTAINER_LIMIT", limit)
    assert not exceeds_memory(mapped)  # no container
    limit.write_text("max\n")
    assert not exceeds_memory(mapped)  # a container without a limit
    limit.write_text(f"{2 * WHOLE.nbytes}\n")
    assert not exceeds_memory(mapped)
    limit.write_text(f"{2 * WHOLE.nbytes - 1}\n")
    assert exceeds_memory(mapped)
    assert exceeds_memory(JoinedRows([mapped, WHOLE]))
    assert not exceeds_memory(WHOLE)
