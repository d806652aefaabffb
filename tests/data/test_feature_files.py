"""Feature files of every layout, read in slices."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import feature_files, parquet_features
from data.feature_files import open_features
from data.schemas import Catalogue, InputError

KEYS = ["a", "b", "ü", "d", "e"]
ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)
NAMES = ["own.npy", "own.safetensors", "own.parquet", "folder"]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Chunks and remembered lines end within the few rows of these tests."""
    monkeypatch.setattr(parquet_features, "DECODED_ROWS", 2)
    monkeypatch.setattr(feature_files, "_KEY_STRIDE", 2)


def write_parquet(path: Path, keys, rows) -> None:
    pl.DataFrame({"item_key": keys, "embedding": rows.tolist()}).write_parquet(path, row_group_size=2)


def write(path: Path, rows: np.ndarray = ROWS, keys=KEYS) -> Path:
    """The same features in the layout that the path's name asks for."""
    if path.suffix == ".npy":
        np.save(path, rows)
        path.with_suffix(".keys.txt").write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    elif path.suffix == ".parquet":
        write_parquet(path, keys, rows)
    elif path.suffix == ".safetensors":
        Catalogue(keys, [""] * len(keys), [""] * len(keys)).save(path)
        packed = {name: value.clone() for name, value in load_file(path).items() if name.startswith("item_keys.")}
        save_file({"before": torch.ones(3), "embeddings": torch.from_numpy(rows), **packed}, path)
    else:
        path.mkdir()
        write_parquet(path / "1.parquet", keys[3:], rows[3:])
        write_parquet(path / "0.parquet", keys[:3], rows[:3])
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_slice_of_every_layout(tmp_path, name):
    features = open_features(write(tmp_path / name), need_keys=True)
    assert features.shape == (5, 2)
    assert features.has_keys
    for begin in range(6):
        for end in range(begin, 6):
            np.testing.assert_array_equal(features[begin:end], ROWS[begin:end])
            assert features.item_keys(begin, end) == KEYS[begin:end]
    np.testing.assert_array_equal(features[3:99], ROWS[3:])
    np.testing.assert_array_equal(features[:], ROWS)
    assert features[4:2].shape == (0, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64]
)
def test_numbers_of_safetensors(tmp_path, dtype):
    rows = torch.tensor([[1.5, -2.0], [96.0, 0.0078125]]).to(dtype)
    save_file({"embeddings": rows}, tmp_path / "own.safetensors")
    read = open_features(tmp_path / "own.safetensors")[1:2]
    assert read.dtype == (np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype)
    assert read.tolist() == rows[1:2].tolist()


def test_half_precision_stays_and_other_byte_orders_are_read(tmp_path):
    np.save(tmp_path / "half.npy", ROWS.astype(np.float16))
    assert open_features(tmp_path / "half.npy")[1:3].dtype == np.float16
    np.save(tmp_path / "big.npy", ROWS.astype(">f4"))
    assert open_features(tmp_path / "big.npy")[1:2].tolist() == [[2.0, 3.0]]


def test_a_file_without_keys(tmp_path):
    np.save(tmp_path / "own.npy", ROWS)
    features = open_features(tmp_path / "own.npy")
    assert not features.has_keys
    assert features.item_keys(0, 2) is None
    with pytest.raises(InputError, match=r"own\.npy needs own\.keys\.txt beside it"):
        open_features(tmp_path / "own.npy", need_keys=True)


def test_key_lines_as_editors_write_them(tmp_path):
    np.save(tmp_path / "own.npy", ROWS[:3])
    (tmp_path / "own.keys.txt").write_bytes("\ufeffa\r\nb\r\nü".encode())
    features = open_features(tmp_path / "own.npy")
    assert features.item_keys(0, 3) == ["a", "b", "ü"]
    assert features.item_keys(2, 3) == ["ü"]
    (tmp_path / "own.keys.txt").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(InputError, match=r"own\.keys\.txt: item keys are not UTF-8"):
        open_features(tmp_path / "own.npy").item_keys(2, 3)


def test_keys_that_are_not_one_per_row(tmp_path):
    write(tmp_path / "own.npy", keys=KEYS[:4])
    with pytest.raises(
        InputError, match=r"expected one row of numbers per key, \[4, D\], got float32 of shape \[5, 2\]"
    ):
        open_features(tmp_path / "own.npy")


def test_digest_counts_content_and_keys_but_neither_place_nor_time(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    digests = {name: open_features(write(tmp_path / name)).content_sha256() for name in NAMES}
    assert len(set(digests.values())) == len(NAMES)
    for name, digest in digests.items():
        again = write(tmp_path / "elsewhere" / name)
        assert open_features(again).content_sha256() == digest
    changed = open_features(write(tmp_path / "own.npy", keys=["a", "b", "c", "d", "e"]))
    assert changed.content_sha256() != digests["own.npy"]
    assert open_features(write(tmp_path / "own.parquet", ROWS + 1)).content_sha256() != digests["own.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_a_change_after_opening_is_noticed(tmp_path, name):
    features = open_features(write(tmp_path / name))
    features.check_unchanged()
    part = tmp_path / name / "1.parquet" if name == "folder" else tmp_path / name
    part.write_bytes(part.read_bytes() + b"more")
    with pytest.raises(InputError, match=f"{name} has changed since it was opened"):
        features.check_unchanged()
    part.unlink()
    with pytest.raises(InputError, match="has changed"):
        features.check_unchanged()


@pytest.mark.parametrize("name", NAMES)
def test_truncated_files_are_refused(tmp_path, name):
    path = write(tmp_path / name)
    part = path / "1.parquet" if name == "folder" else path
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{part.name} is not a whole"):
        open_features(path)
    part.write_bytes(b"")
    with pytest.raises(InputError, match=f"{part.name} is not a whole"):
        open_features(path)


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors"])
def test_a_file_cut_short_while_it_is_read(tmp_path, name):
    """A memory map would kill the process here."""
    features = open_features(write(tmp_path / name))
    with (tmp_path / name).open("r+b") as file:
        file.truncate(300 if name == "own.safetensors" else 136)
    with pytest.raises(InputError, match=r"ends before row 5: it was cut short"):
        features[3:5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"], "embedding": [[1.0]]}, "lacks the columns item_key; its columns: key, embedding"),
        ({"item_key": ["a"], "embedding": [1.0]}, "column embedding holds Float64, expected lists of numbers"),
        ({"item_key": ["a"], "embedding": [None]}, "column embedding holds Null, expected lists of numbers"),
        ({"item_key": ["a", "b"], "embedding": [[], [1.0]]}, "the embedding of item 'a' has no numbers"),
        ({"item_key": [], "embedding": []}, "has no row"),
    ],
)
def test_bad_parquet_tables_are_explained(tmp_path, columns, message):
    pl.DataFrame(columns).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(InputError, match=message):
        open_features(tmp_path / "own.parquet")


def test_bad_parquet_rows_are_named_where_they_are_read(tmp_path):
    table = pl.DataFrame({"item_key": ["a", "b", "c"], "embedding": [[1.0, 2.0], [1.0, None], [1.0]]})
    table.write_parquet(tmp_path / "own.parquet")
    features = open_features(tmp_path / "own.parquet")
    np.testing.assert_array_equal(features[0:2], [[1.0, 2.0], [1.0, np.nan]])
    with pytest.raises(InputError, match="1 embeddings do not have 2 numbers, as the first has: 'c'"):
        features[2:3]
    pl.DataFrame({"item_key": ["a", None], "embedding": [[1.0], [2.0]]}).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(InputError, match="1 rows have no item_key"):
        open_features(tmp_path / "own.parquet").item_keys(0, 2)


def test_parquet_names_are_no_patterns_and_keys_may_be_numbers(tmp_path):
    path = tmp_path / "own[0].parquet"
    pl.DataFrame({"item_key": [7, 8], "embedding": [[1], [2]], "other": ["x", "y"]}).write_parquet(path)
    features = open_features(path)
    assert features.item_keys(0, 2) == ["7", "8"]
    assert features[0:2].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("text", "offsets", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), torch.tensor([0, 2, 1]), r"places of 0\.\.2, got others in rows 0\.\.2"),
        (torch.zeros(2, dtype=torch.uint8), torch.tensor([-1, 0, 1]), "ascending places"),
        (torch.zeros(2, dtype=torch.uint8), torch.tensor([0, 1, 1 << 60]), "ascending places"),
        (torch.zeros(2), torch.tensor([0, 1, 2]), r"item_keys.bytes \[B\] uint8 .* got \[2\] float32"),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(3), r"got \[2\] uint8 and \[3\] float32"),
        (torch.zeros(2, dtype=torch.uint8), torch.tensor(3), r"and \[\] int64"),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), r"offsets \[N\+1\], got none"),
    ],
)
def test_packed_keys_that_are_none(tmp_path, text, offsets, message):
    path = tmp_path / "own.safetensors"
    save_file({"embeddings": torch.zeros(2, 1), "item_keys.bytes": text, "item_keys.offsets": offsets}, path)
    with pytest.raises(InputError, match=message):
        open_features(path).item_keys(0, 2)


@pytest.mark.parametrize("embedding", [{"x": 1.0}, "1.0", 1.0])
def test_embeddings_that_are_no_lists(tmp_path, embedding):
    pl.DataFrame({"item_key": ["a"], "embedding": [embedding]}).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(InputError, match=r"column embedding holds .*, expected lists of numbers"):
        open_features(tmp_path / "own.parquet")


def test_what_is_no_feature_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.npy does not exist"):
        open_features(tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"must end in \.npy, \.safetensors, \.parquet, or be a folder"):
        open_features(tmp_path / "own.csv")
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        open_features(tmp_path)
    np.save(tmp_path / "own.npy", np.array([{"no": "pickles"}], dtype=object))
    with pytest.raises(InputError, match=r"not a whole \.npy file of numbers"):
        open_features(tmp_path / "own.npy")
    for wrong in (np.zeros(3), np.zeros((3, 0)), np.zeros((2, 2), dtype="U1")):
        np.save(tmp_path / "own.npy", wrong)
        with pytest.raises(InputError, match=r"own\.npy"):
            open_features(tmp_path / "own.npy")
    np.save(tmp_path / "own.npy", np.asfortranarray(ROWS))
    with pytest.raises(InputError, match="Fortran order"):
        open_features(tmp_path / "own.npy")
    save_file({"vectors": torch.zeros(1, 1)}, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="lacks the tensor 'embeddings'; its tensors: vectors"):
        open_features(tmp_path / "own.safetensors")
    np.save(tmp_path / "own.npy", ROWS)
    with pytest.raises(ValueError, match="consecutive rows"):
        open_features(tmp_path / "own.npy")[0:4:2]
