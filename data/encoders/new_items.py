"""Features of items that came after the dataset was prepared, made from their texts as the others' were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from data.encoders.sentence import SentenceEncoder
from data.schemas import InputError
from data.text import render_texts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class NewItemEncoder:
    """The text encoder and template of a tokenizer's features; the model is loaded at first use, then kept.

    Args:
        encoder: the one that made the features.
        template: that rendered the texts.
    """

    def __init__(self, encoder: SentenceEncoder, template: Sequence[str]) -> None:
        self._encoder = encoder
        self._template = tuple(template)
        self._fields = {name for part in template for _, name, _, _ in Formatter().parse(part) if name}
        self._model: SentenceTransformer | None = None
        self._lock = Lock()

    @classmethod
    def of(cls, features: Mapping[str, Any], folder: Path | None = None) -> "NewItemEncoder | None":
        """The encoder that a tokenizer's manifest describes, or None where new texts cannot be encoded like the others.

        That is so of TF-IDF, whose features hold within one catalogue, of a user's own features, and of a model that
        was a local folder, unless that is given.

        Args:
            features: `manifest["features"]` of the tokenizer.
            folder: of the sentence-transformers model, if it was a local one.

        Raises:
            InputError: if the folder is none, holds another model, or is given though no model made the features.
        """
        if folder is not None and not folder.is_dir():
            raise InputError(f"there is no folder {folder}; expected one of a sentence-transformers model.")
        if features.get("encoder") != "sentence_transformers" or not features.get("template"):
            if folder is not None:
                made_by = features.get("encoder", "unknown")
                raise InputError(f"{folder} is of no use: the features are not of such a model ({made_by}).")
            return None
        wanted = features.get("model_sha256")
        if folder is None and wanted is not None:
            return None
        encoder = SentenceEncoder(str(folder or features["model"]), batch_size=64)
        if folder is not None and encoder.settings().get("model_sha256") != wanted:
            raise InputError(f"{folder} is not the model {features['model']!r}, which made the features of the others.")
        return cls(encoder, features["template"])

    def __call__(self, items: Sequence[Mapping[str, str]]) -> np.ndarray:
        """[M, D] float32 features of M items, each given as its text fields; safe to call from several threads.

        Raises:
            InputError: if a field is unknown to the template, or the model cannot be loaded.
        """
        import polars as pl

        unknown = sorted({name for item in items for name in item} - self._fields)
        if unknown:
            raise InputError(
                f"unknown text field {unknown[0]!r}; the template reads: {', '.join(sorted(self._fields))}."
            )
        columns = {name: [item.get(name) for item in items] for name in sorted(self._fields)}
        texts = render_texts(pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)), self._template)
        with self._lock:
            self._model = self._model or self._encoder.load()
            return self._model.encode(texts, show_progress_bar=False, convert_to_numpy=True).astype(np.float32)
