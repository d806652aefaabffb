"""Text features without a network or a trained model: TF-IDF, then truncated SVD (latent semantic analysis)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from data.encoders import Encoder, EncoderInput
from data.schemas import InputError

_SEED = 0

_logger = logging.getLogger(__name__)


class TfidfSvdEncoder(Encoder):
    """TF-IDF of words, reduced by truncated SVD; rows have unit length.

    The same texts give the same features. Words that a catalogue does not contain are unknown to it, so features of
    two catalogues cannot be compared.

    Args:
        dim: number of features; clipped, with a warning, to what the texts can give.

    Raises:
        InputError: if dim is not positive.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise InputError(f"FeatureConfig.dim must be at least 1, got {dim}.")
        self.dim = dim

    def settings(self) -> dict[str, Any]:
        """The asked-for width and the version of the method."""
        return {"dim": self.dim, "method": "words, sublinear tf, smooth idf, randomized svd, unit rows; version 1"}

    def encode(self, items: EncoderInput, scratch: Path) -> np.ndarray:
        """[N, min(dim, N, words)] float32; InputError when the texts hold no words or scikit-learn is missing."""
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise InputError("encoder 'tfidf_svd' needs scikit-learn: pip install scikit-learn.") from error
        try:
            words = TfidfVectorizer(sublinear_tf=True).fit_transform(items.texts)
        except ValueError as error:
            raise InputError(
                f"the texts of the {len(items.texts)} items hold no words ({error}). "
                "Choose a FeatureConfig.template whose fields are filled."
            ) from error
        svd = TruncatedSVD(self._width(words.shape), algorithm="randomized", n_iter=7, random_state=_SEED)
        features = svd.fit_transform(words)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return (features / np.maximum(lengths, np.finfo(features.dtype).tiny)).astype(np.float32)

    def _width(self, shape: tuple[int, int]) -> int:
        num_items, num_words = shape
        width = min(self.dim, num_items, num_words)
        if width < self.dim:
            _logger.warning(
                "tfidf_svd: FeatureConfig.dim is %d, but %d items with %d different words give at most %d features; "
                "using %d",
                self.dim,
                num_items,
                num_words,
                width,
                width,
            )
        return width
