import numpy as np
import pytest

from data.joined_rows import JoinedRows
from data.schemas import InputError

# Rows 0 1 2 | none | 3 4 | 5 6 7 8, each filled with its own number.
SIZES = (3, 0, 2, 4)
WHOLE = np.repeat(np.arange(9, dtype=np.float32)[:, None], 2, axis=1)


@pytest.fixture
def joined() -> JoinedRows:
    return JoinedRows(np.split(WHOLE, np.cumsum(SIZES)[:-1]))


def test_the_parts_are_one_matrix(joined):
    assert (joined.shape, len(joined), joined.ndim, joined.nbytes) == ((9, 2), 9, 2, 72)
    assert joined.dtype == np.float32
    assert joined.offsets.tolist() == [0, 3, 3, 5, 9]
    np.testing.assert_array_equal(np.asarray(joined), WHOLE)
    assert np.asarray(joined, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize(
    "rows",
    [
        *(slice(begin, end) for begin in range(10) for end in range(10)),
        slice(-4, None),
        slice(None, 50),
        slice(None, None, 3),
        slice(None, None, -2),
        np.array([8, 0, 3, 3, 2, 5]),
        np.array([-1, -9, 4], dtype=np.int32),
        np.array([], dtype=np.int64),
        [],
        [7, 1],
    ],
    ids=str,
)
def test_rows_are_those_of_one_array(joined, rows):
    found, expected = joined[rows], WHOLE[rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert found.shape == expected.shape


def test_rows_are_located_in_their_parts(joined):
    located = [(part[:, 0].tolist(), *map(list, rest)) for part, *rest in joined.located(np.array([8, 0, 3, 2, 5]))]
    assert located == [([0, 1, 2], [1, 3], [0, 2]), ([3, 4], [2], [0]), ([5, 6, 7, 8], [0, 4], [3, 0])]


def test_a_slice_inside_a_part_is_not_copied(joined):
    assert np.shares_memory(joined[5:8], joined.parts[3])
    assert not np.shares_memory(joined[4:6], joined.parts[3])


def test_types_are_those_that_hold_every_part():
    joined = JoinedRows([np.ones((2, 1), np.float16), np.full((1, 1), 0.1, np.float32)])
    assert joined.dtype == np.float32
    for rows in (slice(0, 1), slice(0, 3), np.array([0])):
        assert joined[rows].dtype == np.float32
    assert joined[2:].item() == np.float32(0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 9]), "row 9 is outside a matrix of 9 rows"),
        (np.array([-10]), "row -10 is outside"),
        (np.ones(9, dtype=bool), r"by a slice or by integers \[M\], got bool of shape \[9\]"),
        (np.array([[1]]), r"got int64 of shape \[1, 1\]"),
        (4, r"got int64 of shape \[\]"),
        (np.array([0.5]), "got float64"),
    ],
    ids=str,
)
def test_other_ways_of_choosing_rows_are_refused(joined, rows, message):
    with pytest.raises(IndexError, match=message):
        joined[rows]


def test_a_part_of_another_width_is_named():
    parts = [np.ones((2, 3)), np.ones((4, 5))]
    with pytest.raises(InputError, match="part 1 has features of width 5, expected 3 as part 0 has"):
        JoinedRows(parts)
    with pytest.raises(InputError, match="sports has features of width 5, expected 3 as beauty has"):
        JoinedRows(parts, names=["beauty", "sports"])


@pytest.mark.parametrize("part", [np.ones(3), np.ones((1, 3, 1)), np.array([["a"]])], ids=lambda part: str(part.shape))
def test_what_is_no_matrix_of_numbers_is_refused(part):
    with pytest.raises(InputError, match="part 1 expected a matrix of numbers, got"):
        JoinedRows([np.ones((2, 3)), part])


def test_no_parts_are_refused():
    with pytest.raises(InputError, match="at least one matrix"):
        JoinedRows([])
