"""A user's own embeddings, read from a file and matched to the items by key."""

import hashlib
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.encoders import Encoder, EncoderInput
from data.schemas import InputError, read_safetensors

_logger = logging.getLogger(__name__)


class FileEncoder(Encoder):
    """Embeddings of one file, in any of three layouts.

    - `NAME.npy`, [M, D] numbers, with `NAME.keys.txt`, one item key a line (UTF-8);
    - `NAME.safetensors` with a tensor `embeddings` [M, D], and `NAME.keys.txt` beside it, or the keys inside as
      `item_keys.bytes` (UTF-8, one after the other) and `item_keys.offsets` ([M+1] int64), as a Catalogue saves them;
    - `NAME.parquet` with the columns `item_key` (text) and `embedding` (list or array of numbers).

    Rows may be in any order; rows of other items are ignored.

    Raises:
        InputError: if there is no such file, or it is of another kind.
    """

    reads_texts = False

    def __init__(self, path: Path) -> None:
        if path.suffix not in _READERS:
            raise InputError(f"FeatureConfig.path: {path} must end in {', '.join(_READERS)}.")
        if not path.is_file():
            raise InputError(f"FeatureConfig.path: {path} does not exist. Check the path.")
        self.path = path

    def settings(self) -> dict[str, Any]:
        """Name and content hash of the file, and of the keys beside it."""
        digest = hashlib.sha256()
        try:
            for path in filter(Path.is_file, (self.path, _keys_path(self.path))):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"FeatureConfig.path: cannot read {path} ({error}).") from error
        return {"file": self.path.name, "file_sha256": digest.hexdigest()}

    def encode(self, items: EncoderInput, scratch: Path) -> np.ndarray:
        """[N, D] float32 in item order; InputError names items without a row, and keys with several."""
        keys, rows = _READERS[self.path.suffix](self.path)
        if rows.ndim != 2 or rows.shape[0] != len(keys) or rows.shape[1] == 0 or rows.dtype.kind not in "fiu":
            raise InputError(
                f"{self.path}: expected one row of numbers per key, [{len(keys)}, D], "
                f"got {rows.dtype} of shape {list(rows.shape)}."
            )
        positions = self._positions(keys)
        missing = [key for key in items.item_keys if key not in positions]
        if missing:
            raise InputError(
                f"{self.path} has {len(keys)} keys but lacks {len(missing)} of the {len(items.item_keys)} items: "
                f"{_examples(missing)}. Add their rows; keys must be written as in the dataset's items.parquet."
            )
        if len(keys) > len(items.item_keys):
            _logger.info("%s: %d rows of other items are ignored", self.path, len(keys) - len(items.item_keys))
        chosen = rows[[positions[key] for key in items.item_keys]]
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
            return chosen.astype(np.float32)

    def _positions(self, keys: list[str]) -> dict[str, int]:
        positions: dict[str, int] = {}
        repeated = [key for position, key in enumerate(keys) if positions.setdefault(key, position) != position]
        if repeated:
            raise InputError(
                f"{self.path}: {len(repeated)} rows repeat a key that was there before: {_examples(repeated)}. "
                "Keep one row per key."
            )
        return positions


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole .npy file of numbers ({error}). Write it again by np.save.") from error
    return _read_keys(path), rows


def _read_safetensors(path: Path) -> tuple[list[str], np.ndarray]:
    tensors = read_safetensors(path)
    if "embeddings" not in tensors:
        raise InputError(f"{path} lacks the tensor 'embeddings'; its tensors: {', '.join(tensors)}.")
    rows = tensors["embeddings"].float().numpy()
    if "item_keys.bytes" not in tensors or "item_keys.offsets" not in tensors:
        return _read_keys(path), rows
    text, offsets = tensors["item_keys.bytes"].numpy().tobytes(), tensors["item_keys.offsets"].tolist()
    return [_decode(text[begin:end], path) for begin, end in pairwise(offsets)], rows


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import polars as pl

    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path} is not a whole parquet file ({error}). Write it again.") from error
    lacking = [name for name in ("item_key", "embedding") if name not in table.columns]
    if lacking:
        raise InputError(
            f"{path} lacks the columns {', '.join(lacking)}; its columns: {', '.join(table.columns)}. "
            "Rename them to item_key and embedding."
        )
    keys = table["item_key"].cast(pl.String)
    if keys.null_count():
        raise InputError(f"{path}: {keys.null_count()} rows have no item_key. Remove them.")
    return keys.to_list(), _stack(table["embedding"], keys, path)


def _stack(embeddings: Any, keys: Any, path: Path) -> np.ndarray:
    """[M, D] from a column of lists, which must be of one length; null numbers become NaN."""
    import polars as pl

    lists = embeddings.cast(pl.List(pl.Float32), strict=False) if embeddings.dtype.is_nested() else None
    if lists is None:
        raise InputError(f"{path}: column embedding holds {embeddings.dtype}, expected lists of numbers.")
    lengths = lists.list.len().fill_null(0)
    width = int(lengths.max() or 0)
    if (lengths != width).any() or width == 0:
        wrong = keys.filter((lengths != width) | (lengths == 0)).to_list()
        raise InputError(
            f"{path}: {len(wrong)} embeddings have fewer than {width} numbers: {_examples(wrong)}. "
            "Give all items embeddings of one width."
        )
    return lists.explode().fill_null(float("nan")).to_numpy().reshape(len(lists), width)


def _read_keys(path: Path) -> list[str]:
    keys_path = _keys_path(path)
    if not keys_path.is_file():
        raise InputError(f"{path} needs {keys_path.name} beside it: the item key of each row, one a line.")
    text = _decode(keys_path.read_bytes(), keys_path).removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _keys_path(path: Path) -> Path:
    return path.with_suffix(".keys.txt")


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: item keys are not UTF-8 ({error}). Write them again as UTF-8.") from error


def _examples(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (", ..." if len(keys) > 3 else "")


_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
