from pathlib import Path

import numpy as np
import pytest

from data.encoders.new_items import NewItemEncoder
from data.encoders.sentence import SentenceEncoder
from data.schemas import InputError

FEATURES = {
    "encoder": "sentence_transformers",
    "model": "owner/model",
    "template": ["{title}.", "Brand: {brand}."],
    "width": 2,
}


class FakeModel:
    """Gives the length of each text."""

    def __init__(self):
        self.encoded = []

    def encode(self, batch, **_):
        self.encoded += batch
        return np.array([[len(text), 1.0] for text in batch], dtype=np.float64)


def test_texts_are_rendered_by_the_template_and_the_model_is_loaded_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(SentenceEncoder, "load", lambda self: loaded.append(FakeModel()) or loaded[-1])
    encode = NewItemEncoder.of(FEATURES)
    assert loaded == []
    features = encode([{"title": "Tent", "brand": " "}, {"brand": "Acme"}])
    assert features.dtype == np.float32
    assert features.tolist() == [[5.0, 1.0], [12.0, 1.0]]
    encode([{}])
    (model,) = loaded
    assert model.encoded == ["Tent.", "Brand: Acme.", "No description is available for this item."]


def test_unknown_fields_are_refused_before_the_model_is_loaded():
    encode = NewItemEncoder.of(FEATURES)
    with pytest.raises(InputError, match="unknown text field 'colour'; the template reads: brand, title"):
        encode([{"title": "Tent"}, {"colour": "red"}])


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"encoder": "file", "file": "x.npy"},
        {"encoder": "tfidf_svd", "template": ["{title}."], "dim": 4},
        {**FEATURES, "template": None},
        {**FEATURES, "model": "folder", "model_sha256": "0" * 64},
    ],
)
def test_where_new_texts_cannot_be_encoded_like_the_others(features, tmp_path):
    assert NewItemEncoder.of(features) is None
    with pytest.raises(InputError, match=f"{tmp_path} is "):
        NewItemEncoder.of(features, tmp_path)


def test_a_folder_that_is_none_is_not_taken_for_a_model_of_the_hub(tmp_path):
    with pytest.raises(InputError, match="there is no folder owner/other"):
        NewItemEncoder.of(FEATURES, Path("owner/other"))


def test_a_local_model_is_known_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    wanted = SentenceEncoder(str(tmp_path), 8).settings()
    assert NewItemEncoder.of({**FEATURES, **wanted}, tmp_path) is not None
    (tmp_path / "config.json").write_text("{ }")
    with pytest.raises(InputError, match=r"is not the model .*which made the features of the others"):
        NewItemEncoder.of({**FEATURES, **wanted}, tmp_path)
