import numpy as np
import pytest

from data import aligned_features
from data.aligned_features import align_features
from data.feature_files import FeatureFile, open_features
from data.schemas import InputError

ROWS = np.arange(14, dtype=np.float16).reshape(7, 2)


@pytest.fixture
def feature_file(tmp_path):
    def write(keys=None):
        np.save(tmp_path / "features.npy", ROWS)
        if keys is not None:
            (tmp_path / "features.keys.txt").write_text("".join(f"{key}\n" for key in keys))
        return open_features(tmp_path / "features.npy")

    return write


def test_a_file_in_the_order_of_the_items_is_not_copied(feature_file):
    features = feature_file("abcdefg")
    assert align_features(features, list("abcdefg")) is features


@pytest.mark.parametrize("block_rows", [1, 3, 8192])
def test_other_orders_and_further_rows(feature_file, monkeypatch, block_rows):
    monkeypatch.setattr(aligned_features, "_BLOCK_ROWS", block_rows)
    aligned = align_features(feature_file("abcdefg"), ["g", "b", "c"])
    np.testing.assert_array_equal(aligned, ROWS[[6, 1, 2]])
    assert aligned.dtype == np.float16
    np.testing.assert_array_equal(align_features(feature_file("abcdefg"), list("abcdef")), ROWS[:6])


def test_rows_without_keys_are_those_of_the_items(feature_file):
    features = feature_file()
    assert align_features(features, list("tuvwxyz")) is features
    with pytest.raises(InputError, match=r"features\.npy has 7 rows and no item keys, expected a row for each of 6"):
        align_features(features, list("uvwxyz"))


def test_missing_and_repeated_items_are_named(feature_file):
    with pytest.raises(InputError, match=r"lacks 4 of 6 items: 'v', 'w', 'x', \.\.\."):
        align_features(feature_file("abcdefg"), ["a", "b", "v", "w", "x", "y"])
    with pytest.raises(InputError, match="repeats 1 of 2 items: 'a'"):
        align_features(feature_file("abcadeg"), ["a", "b"])
    assert isinstance(align_features(feature_file("abcddeg"), ["a", "b"]), np.ndarray)
    assert not isinstance(align_features(feature_file("abcddeg"), ["a", "b"]), FeatureFile)
