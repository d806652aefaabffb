"""A user's own embeddings, read from a file and matched to the items by key."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.aligned_features import put_rows
from data.encoders import Encoder, EncoderInput
from data.feature_files import SUFFIXES, FeatureFile, keys_path, open_features
from data.parquet_features import examples
from data.schemas import InputError

_logger = logging.getLogger(__name__)


class FileEncoder(Encoder):
    """Embeddings of one file with item keys, in any layout that `data.feature_files` describes.

    Rows may be in any order; rows of other items are ignored.

    Args:
        path: of the file.
        allow_missing: items that the file lacks get zeros.

    Raises:
        InputError: if there is no such file, or it is of another kind.
    """

    reads_texts = False

    def __init__(self, path: Path, *, allow_missing: bool = False) -> None:
        if path.suffix not in SUFFIXES:
            raise InputError(f"FeatureConfig.path: {path} must end in {', '.join(SUFFIXES)}.")
        if not path.is_file():
            raise InputError(f"FeatureConfig.path: {path} does not exist. Check the path.")
        self.path = path
        self.allow_missing = allow_missing

    def settings(self) -> dict[str, Any]:
        """Name and content hash of the file, and of the keys beside it, and that items may be missing."""
        digest = hashlib.sha256()
        try:
            for path in filter(Path.is_file, (self.path, keys_path(self.path))):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"FeatureConfig.path: cannot read {path} ({error}).") from error
        missing = {"missing": "vector"} if self.allow_missing else {}
        return {"file": self.path.name, "file_sha256": digest.hexdigest(), **missing}

    def missing(self, items: EncoderInput) -> np.ndarray:
        """[N] bool, true where the file has no row."""
        return self._rows(items, open_features(self.path, need_keys=True)) < 0

    def encode(self, items: EncoderInput, scratch: Path) -> np.ndarray:
        """[N, D] float32 in item order; InputError names items without a row, and keys with several."""
        features = open_features(self.path, need_keys=True)
        return _chosen(features, self._rows(items, features), scratch)

    def _rows(self, items: EncoderInput, features: FeatureFile) -> np.ndarray:
        """[N] int64 the file's row of each item, -1 where it has none."""
        keys = features.item_keys(0, len(features))
        assert keys is not None
        positions = self._positions(keys)
        missing = [key for key in items.item_keys if key not in positions]
        if missing and (not self.allow_missing or len(missing) == len(items.item_keys)):
            raise InputError(
                f"{self.path} has {len(keys)} keys but lacks {len(missing)} of the {len(items.item_keys)} items: "
                f"{examples(missing)}. Add their rows, or set FeatureConfig.missing = 'vector' where some have none; "
                "keys must be written as in the dataset's items.parquet."
            )
        num_others = len(keys) - len(items.item_keys) + len(missing)
        if num_others:
            _logger.info("%s: %d rows of other items are ignored", self.path, num_others)
        return np.array([positions.get(key, -1) for key in items.item_keys], dtype=np.int64)

    def _positions(self, keys: list[str]) -> dict[str, int]:
        positions: dict[str, int] = {}
        repeated = [key for position, key in enumerate(keys) if positions.setdefault(key, position) != position]
        if repeated:
            raise InputError(
                f"{self.path}: {len(repeated)} rows repeat a key that was there before: {examples(repeated)}. "
                "Keep one row per key."
            )
        return positions


def _chosen(features: FeatureFile, places: np.ndarray, scratch: Path) -> np.ndarray:
    """Rows of a file, in any order, [len(places), D] fp32, in a file of their own, so that they need no memory.

    A row whose place is -1 is zeros.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path, shape = scratch / "rows.npy", (len(places), features.shape[1])
    chosen = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no crash when a page is written
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    rows = np.full(len(features), -1, dtype=np.int64)
    rows[places[places >= 0]] = np.flatnonzero(places >= 0)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        put_rows(features, rows, chosen)
    return chosen
