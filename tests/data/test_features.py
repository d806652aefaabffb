"""Texts and the feature store: nothing encoded twice, nothing stale, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data import encoders
from data.encoders import Encoder
from data.features import FeatureConfig, load_item_features
from data.processed import DatasetConfig, PreparedDataset, RecDataset, TablesConfig, load_dataset
from data.schemas import InputError
from data.text import NO_TEXT, render_texts

REPOSITORY = Path(__file__).resolve().parents[2]
ITEMS = pl.DataFrame({"title": ["Tent", None, " "], "brand": ["Fern", "Moss", None], "price": [12.5, None, 3.0]})
TFIDF = FeatureConfig(encoder="tfidf_svd", dim=2)


class CountingEncoder(Encoder):
    """One feature per item, the length of its text; counts how often it is asked, and fails where told to."""

    calls = 0
    width = 1
    value = 0.0

    def settings(self):
        return {"width_asked": self.width}

    def encode(self, items, scratch):
        CountingEncoder.calls += 1
        scratch.mkdir()
        rows = np.array([[float(len(text))] * self.width for text in items.texts], dtype=np.float32)
        rows[1] += self.value
        return rows


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(CountingEncoder, "calls", 0)
    monkeypatch.setitem(encoders.ENCODERS, "counting", lambda config: CountingEncoder())
    return FeatureConfig(encoder="counting", template=("{title}",))


def prepare(root: Path, titles: list[str | None], name: str = "shop") -> PreparedDataset:
    keys = [f"i{number}" for number in range(len(titles))]
    pl.DataFrame({"item_id": keys, "title": titles}).write_parquet(root / "items.parquet")
    log = [(user, key, time) for user in ("u1", "u2") for time, key in enumerate(keys)]
    pl.DataFrame(log, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(root / "log.parquet")
    tables = TablesConfig(
        interactions=str(root / "log.parquet"), items=str(root / "items.parquet"), title_column="title", name=name
    )
    return load_dataset(
        DatasetConfig(dataset=RecDataset.TABLES, root=str(root / "out"), min_interactions=1, tables=tables)
    )


def test_sentences_with_missing_fields_are_left_out():
    texts = render_texts(ITEMS, ("{title}.", "Made by {brand} for {price} dollars.", "Brand: {brand}."))
    assert texts == ["Tent. Made by Fern for 12.5 dollars. Brand: Fern.", "Brand: Moss.", NO_TEXT]
    assert NO_TEXT == "No description is available for this item."


def test_template_without_fields_braces_and_empty_tables():
    assert render_texts(ITEMS, ("A {{thing}}.", "")) == ["A {thing}."] * 3
    assert render_texts(ITEMS.head(0), ("{title}.",)) == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (("By {maker}.",), r"unknown field 'maker'; columns of the item table: title, brand, price"),
        (("{title",), "malformed"),
        (("{price:.2f}",), "formats are not supported"),
        (("{}",), "unknown field ''"),
        ((), "tuple of sentences"),
        ("{title}", "tuple of sentences"),
    ],
)
def test_bad_templates_are_explained(template, message):
    with pytest.raises(InputError, match=message):
        render_texts(ITEMS, template)


def test_a_nested_column_is_refused():
    with pytest.raises(InputError, match=r"column 'tags' holds List\(String\)"):
        render_texts(pl.DataFrame({"tags": [["a"]]}), ("{tags}",))


def test_features_are_encoded_once_and_mapped(tmp_path, counting):
    dataset = prepare(tmp_path, ["Tent", "Lamp shade", None])
    first = load_item_features(dataset, counting)
    again = load_item_features(dataset, counting)
    assert CountingEncoder.calls == 1
    assert isinstance(again.values, np.memmap)
    assert again.values.dtype == np.float32
    assert first.values.tolist() == again.values.tolist() == [[4.0], [10.0], [float(len(NO_TEXT))]]
    assert first.missing.tolist() == again.missing.tolist() == [False, False, True]
    assert first.description == again.description
    description = {**first.description}
    assert description.pop("item_table_hash") == dataset.item_table_hash
    assert description == {
        "format_version": 1,
        "encoder": "counting",
        "width_asked": 1,
        "template": ["{title}"],
        "num_items": 3,
        "width": 1,
        "num_missing": 1,
    }
    folders = [path.name for path in (tmp_path / "out" / "features" / "shop").iterdir() if path.is_dir()]
    assert len(folders) == 1  # the scratch folder is gone
    assert len(folders[0]) == 64


def test_template_settings_and_item_table_each_make_new_features(tmp_path, counting, monkeypatch):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    load_item_features(dataset, counting)
    load_item_features(dataset, FeatureConfig(encoder="counting", template=("{title}!",)))
    assert CountingEncoder.calls == 2
    monkeypatch.setattr(CountingEncoder, "width", 3)
    assert load_item_features(dataset, counting).values.shape == (3, 3)
    assert CountingEncoder.calls == 3
    changed = prepare(tmp_path, ["Tent", "Lamp", "Frying pan"])
    assert load_item_features(changed, counting).values[2].tolist() == [10.0, 10.0, 10.0]
    assert CountingEncoder.calls == 4
    load_item_features(changed, FeatureConfig(encoder="counting", template=("{title}",), batch_size=7, dim=9))
    assert CountingEncoder.calls == 4  # settings of other encoders, and the batch size, decide no value


def test_the_source_template_is_the_default(tmp_path, counting):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    description = load_item_features(dataset, FeatureConfig(encoder="counting")).description
    assert tuple(description["template"]) == dataset.text_template


@pytest.mark.parametrize("damage", ["truncated", "empty", "no manifest", "other manifest", "no features"])
def test_damaged_features_are_made_again(tmp_path, counting, damage):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    expected = load_item_features(dataset, counting).values.tolist()
    (path,) = (tmp_path / "out" / "features").rglob("features.npy")
    manifest = path.with_name("manifest.json")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no features":
        path.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_items": 4}))
    assert load_item_features(dataset, counting).values.tolist() == expected
    assert CountingEncoder.calls == 2


def test_not_a_number_names_the_items_and_stores_nothing(tmp_path, counting, monkeypatch):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    monkeypatch.setattr(CountingEncoder, "value", float("nan"))
    with pytest.raises(
        InputError, match=r"features of 1 items hold NaN, infinite or missing numbers \(counting\): 'i1'\."
    ):
        load_item_features(dataset, counting)
    assert not list((tmp_path / "out" / "features").rglob("*.npy"))
    monkeypatch.setattr(CountingEncoder, "value", 1.0)
    assert load_item_features(dataset, counting).values[1].tolist() == [5.0]


def test_items_that_a_file_lacks_are_marked_and_told_of_every_time(tmp_path, caplog):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan", "Pot"])
    np.save(tmp_path / "own.npy", np.ones((2, 3), dtype=np.float16))
    (tmp_path / "own.keys.txt").write_text("i3\ni1\n")
    own = FeatureConfig(encoder="file", path=str(tmp_path / "own.npy"), missing="vector")
    for _ in range(2):
        caplog.clear()
        features = load_item_features(dataset, own)
        assert features.missing.tolist() == [True, False, True, False]
        assert features.values.tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [1.0] * 3]
        assert features.description["num_missing"] == 2
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "shop: 2 of 4 items have no row in the file of features: 'i0', 'i2'"
        ]
    with pytest.raises(InputError, match=r"lacks 2 of the 4 items: 'i0', 'i2'\. .*FeatureConfig\.missing = 'vector'"):
        load_item_features(dataset, FeatureConfig(encoder="file", path=str(tmp_path / "own.npy")))


@pytest.mark.parametrize("damage", ["gone", "empty", "other items"])
def test_damaged_marks_of_missing_items_are_made_again(tmp_path, counting, damage, caplog):
    dataset = prepare(tmp_path, ["Tent", None, "Pan"])
    load_item_features(dataset, counting)
    assert "shop: 1 of 3 items have no text: 'i1'" in caplog.text
    (path,) = (tmp_path / "out" / "features").rglob("missing.npy")
    if damage == "gone":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, np.array([True, True, False]))
    assert load_item_features(dataset, counting).missing.tolist() == [False, True, False]
    assert CountingEncoder.calls == 2


def test_features_of_before_items_could_be_missing_are_read(tmp_path, counting):
    """Their folders hold the same files, so that nothing is encoded again."""
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    load_item_features(dataset, counting)
    (manifest,) = (tmp_path / "out" / "features").rglob("manifest.json")
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["features.npy", "manifest.json"]
    assert "missing" not in json.loads(manifest.read_text())
    assert not load_item_features(dataset, counting).missing.any()
    assert CountingEncoder.calls == 1


def test_an_unwritable_store_is_one_clear_error(tmp_path, counting):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    (tmp_path / "out" / "features").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot write"):
        load_item_features(dataset, counting)


def test_unknown_encoder_lists_the_valid_ones(tmp_path):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    with pytest.raises(
        InputError, match="unknown encoder 'glove'; valid encoders: sentence_transformers, tfidf_svd, file"
    ):
        load_item_features(dataset, FeatureConfig(encoder="glove"))


def test_unknown_template_field_lists_the_columns(tmp_path):
    dataset = prepare(tmp_path, ["Tent", "Lamp", "Pan"])
    with pytest.raises(InputError, match="unknown field 'maker'; columns of the item table: item_id, item_key, title"):
        load_item_features(dataset, FeatureConfig(encoder="tfidf_svd", dim=2, template=("{maker}",)))


def test_existing_features_are_read_without_the_packages_that_made_them(tmp_path):
    """A machine without polars, scikit-learn and sentence-transformers reads what another one prepared and encoded."""
    dataset = prepare(tmp_path, ["red tent", "blue tent", "red pan"])
    expected = load_item_features(dataset, TFIDF).values.tolist()
    code = f"""
import json, sys
for name in ("polars", "sklearn", "sentence_transformers", "transformers", "pandas", "wandb"):
    sys.modules[name] = None
from pathlib import Path
from data.features import FeatureConfig, load_item_features
from data.processed import PreparedDataset
dataset = PreparedDataset(Path({str(dataset.folder)!r}))
print(json.dumps(load_item_features(dataset, FeatureConfig(encoder="tfidf_svd", dim=2)).values.tolist()))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected
