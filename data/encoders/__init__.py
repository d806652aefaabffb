"""Item encoders: what turns an item's text, or a user's own file, into a row of the feature matrix.

Adding an encoder is one file with a subclass of `Encoder` and one entry of `ENCODERS`. Heavy packages are imported
inside `encode`, so that features which exist already can be read without them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from data.schemas import InputError
from data.text import NO_TEXT

if TYPE_CHECKING:
    from data.features import FeatureConfig


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """The items to encode; position i describes item_id i.

    Attributes:
        item_keys: of all items.
        texts: rendered by the template; empty for an encoder that reads none.
    """

    item_keys: list[str]
    texts: list[str]


class Encoder(ABC):
    """Makes the feature matrix of a catalogue.

    Attributes:
        reads_texts: whether the features depend on the items' texts, hence on the template.
    """

    reads_texts: ClassVar[bool] = True

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What besides the items decides the values, as JSON values; features are looked up by it.

        Local files count by their content, not by their path.
        """

    def missing(self, items: EncoderInput) -> np.ndarray:
        """[N] bool, true for items that have nothing to encode.

        Raises:
            InputError: as for `encode`.
        """
        texts = items.texts if self.reads_texts else [""] * len(items.item_keys)
        return np.array([text == NO_TEXT for text in texts], dtype=bool)

    @abstractmethod
    def encode(self, items: EncoderInput, scratch: Path) -> np.ndarray:
        """The features as [N, D] float32.

        Args:
            items: what to encode.
            scratch: where an encoder may make a folder for unfinished work; it outlives a killed run and belongs to
                these items and settings.

        Raises:
            InputError: if a model or file is missing, or does not fit the items.
        """


def build_encoder(config: "FeatureConfig") -> Encoder:
    """The encoder that a config names.

    Raises:
        InputError: if there is no such encoder, or a setting that it needs is missing.
    """
    if config.encoder not in ENCODERS:
        raise InputError(f"unknown encoder {config.encoder!r}; valid encoders: {', '.join(ENCODERS)}.")
    return ENCODERS[config.encoder](config)


def _sentence_transformers(config: "FeatureConfig") -> Encoder:
    from data.encoders.sentence import SentenceEncoder

    if not config.model:
        raise InputError(
            "encoder 'sentence_transformers' needs FeatureConfig.model: a Hub id such as "
            "'sentence-transformers/sentence-t5-base', or a local folder."
        )
    return SentenceEncoder(config.model, config.batch_size)


def _tfidf_svd(config: "FeatureConfig") -> Encoder:
    from data.encoders.tfidf import TfidfSvdEncoder

    if config.dim is None:
        raise InputError("encoder 'tfidf_svd' needs FeatureConfig.dim, the number of features per item, such as 256.")
    return TfidfSvdEncoder(config.dim)


def _file(config: "FeatureConfig") -> Encoder:
    from data.encoders.external import FileEncoder

    if not config.path:
        raise InputError("encoder 'file' needs FeatureConfig.path: a .npy, .safetensors or .parquet file.")
    if config.missing not in ("error", "vector"):
        raise InputError(f"FeatureConfig.missing expected 'error' or 'vector', got {config.missing!r}.")
    return FileEncoder(Path(config.path).expanduser(), allow_missing=config.missing == "vector")


ENCODERS: dict[str, Callable[["FeatureConfig"], Encoder]] = {
    "sentence_transformers": _sentence_transformers,
    "tfidf_svd": _tfidf_svd,
    "file": _file,
}
