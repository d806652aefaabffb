"""Item features in files of any length, read in slices of rows and never whole.

- `NAME.npy`, [N, D] numbers, with or without `NAME.keys.txt`, one item key a line (UTF-8);
- `NAME.safetensors` with a tensor `embeddings` [N, D], and `NAME.keys.txt` beside it, or the keys inside as
  `item_keys.bytes` (UTF-8, one after the other) and `item_keys.offsets` ([N+1] int64), as a Catalogue saves them,
  or no keys;
- `NAME.parquet` with the columns `item_key` (text) and `embedding` (list or array of numbers), or a folder of such
  files, read in the order of their names. Whole row groups are held while their rows are read.

What is read is copied out of the file, not mapped: a map's pages would count as the process's memory, and a file that
is cut short meanwhile would kill it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from data.files import file_sha256
from data.parquet_features import ParquetFeatures
from data.schemas import InputError

SUFFIXES = (".npy", ".safetensors", ".parquet")
_KEY_STRIDE = 4096
"""Lines of a keys file between two places that are remembered."""


class FeatureFile:
    """Rows [N, D] of a file or a folder, and their item keys where it has them; see `open_features`.

    `features[begin:end]` is a new array [end - begin, D], of the file's own numbers (fp32 for bfloat16 and for what a
    parquet file holds): what the protocol FeatureMatrix asks for.

    Attributes:
        path: the file or folder.
        shape: (N, D).
        has_keys: whether `item_keys` knows them.
    """

    def __init__(self, path: Path, rows: "_Rows", read_keys: "_ReadKeys | None", files: Sequence[Path]) -> None:
        self.path = path
        self.shape = rows.shape
        self.has_keys = read_keys is not None
        self._rows, self._read_keys, self._files = rows, read_keys, list(files)
        self._opened = self._stamps()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows (InputError where the file has been cut short, or a row of it has another width)."""
        begin, end, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"FeatureFile expected consecutive rows, got {rows}.")
        return self._rows.read(begin, max(begin, end))

    def item_keys(self, begin: int, end: int) -> list[str] | None:
        """Keys of consecutive rows, or None where the file has none."""
        return None if self._read_keys is None else self._read_keys(begin, end)

    def content_sha256(self) -> str:
        """Digest of the content of all files, keys included, whatever their place and time; reads them once."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(bytes.fromhex(file_sha256(file)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that was written since it was opened (InputError)."""
        if self._stamps() != self._opened:
            raise InputError(f"{self.path} has changed since it was opened. Let it be, and run again.")

    def _stamps(self) -> list[tuple[int, int]]:
        try:
            return [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self._files)]
        except FileNotFoundError:
            return []


def open_features(path: Path, *, need_keys: bool = False) -> FeatureFile:
    """Features of a file or folder in one of the layouts above.

    Args:
        path: of the file, or of a folder of parquet files.
        need_keys: refuse a file without item keys.

    Raises:
        InputError: if it is missing, of another kind, not whole, empty, or its keys are not one per row.
    """
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise InputError(f"{path} holds no .parquet file. Give a folder of parquet files, or one file.")
        return _open_parquet(path, files)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {', '.join(SUFFIXES)}, or be a folder of parquet files.")
    if not path.is_file():
        raise InputError(f"{path} does not exist. Check the path.")
    if path.suffix == ".parquet":
        return _open_parquet(path, [path])
    rows, keys = (_npy_rows(path), None) if path.suffix == ".npy" else _safetensors_rows(path)
    lines = keys_path(path)
    if keys is None and lines.is_file():
        keys = _KeyLines(lines)
    if keys is None and need_keys:
        raise InputError(f"{path} needs {lines.name} beside it: the item key of each row, one a line.")
    _check_shape(path, rows, keys)
    files = [path, lines] if isinstance(keys, _KeyLines) else [path]
    return FeatureFile(path, rows, None if keys is None else keys.read, files)


def keys_path(path: Path) -> Path:
    """Where the item keys of a .npy or .safetensors file may lie."""
    return path.with_suffix(".keys.txt")


_ReadKeys = Callable[[int, int], list[str]]


class _Rows(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def read(self, begin: int, end: int) -> np.ndarray: ...


class _Keys(Protocol):
    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> list[str]: ...


def _check_shape(path: Path, rows: _Rows, keys: _Keys | None) -> None:
    is_matrix = len(rows.shape) == 2 and rows.shape[1] > 0 and np.dtype(rows.dtype).kind in "fiu"
    if not is_matrix or (keys is not None and len(keys) != rows.shape[0]):
        num_rows = "N" if keys is None else len(keys)
        raise InputError(
            f"{path}: expected one row of numbers per key, [{num_rows}, D], "
            f"got {rows.dtype} of shape {list(rows.shape)}."
        )
    if rows.shape[0] == 0:
        raise InputError(f"{path} has no row.")


class _Array(NamedTuple):
    """An array that lies in a file as it lies in memory."""

    path: Path
    offset: int
    dtype: Any
    shape: tuple[int, ...]

    def read(self, begin: int, end: int) -> np.ndarray:
        """Some of its rows."""
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        count, offset = (end - begin) * row, self.offset + begin * row * self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, count, offset=offset)
        if len(values) != count:
            raise InputError(f"{self.path} ends before row {end:,}: it was cut short. Write it again.")
        return values.reshape(-1, *self.shape[1:])


class _Bfloat16Rows(NamedTuple):
    """Rows of bfloat16, which numpy does not know: the upper halves of fp32 numbers."""

    halves: _Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.halves.shape

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32)

    def read(self, begin: int, end: int) -> np.ndarray:
        return (self.halves.read(begin, end).astype(np.uint32) << 16).view(np.float32)


def _npy_rows(path: Path) -> _Array:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a whole .npy file of numbers ({error}). Write it again by np.save.") from error
    if not mapped.flags.c_contiguous:
        raise InputError(f"{path} is in Fortran order. Write it again by np.save(..., np.ascontiguousarray(rows)).")
    return _Array(path, mapped.offset, mapped.dtype, mapped.shape)


_SAFETENSORS_DTYPES = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": "<u2",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


def _safetensors_rows(path: Path) -> tuple[_Rows, "_Keys | None"]:
    """Rows and, where they are inside, keys of a safetensors file."""
    try:
        with safe_open(path, framework="np") as file:  # which checks header and length
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}). Copy it again.") from error
    if "embeddings" not in names:
        raise InputError(f"{path} lacks the tensor 'embeddings'; its tensors: {', '.join(names)}.")
    with path.open("rb") as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(num_bytes))

    def array(name: str) -> _Array:
        entry = header[name]
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(f"{path}: tensor {name!r} holds {entry['dtype']}, expected numbers.")
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        return _Array(path, 8 + num_bytes + entry["data_offsets"][0], dtype, tuple(entry["shape"]))

    rows = array("embeddings")
    has_keys = "item_keys.bytes" in names and "item_keys.offsets" in names
    keys = _packed_keys(array("item_keys.bytes"), array("item_keys.offsets")) if has_keys else None
    return _Bfloat16Rows(rows) if header["embeddings"]["dtype"] == "BF16" else rows, keys


class _PackedKeys(NamedTuple):
    """Keys as a Catalogue saves them: bytes, one key after the other, and the boundaries."""

    text: _Array
    offsets: _Array

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def read(self, begin: int, end: int) -> list[str]:
        bounds = self.offsets.read(begin, end + 1).tolist()
        if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > self.text.shape[0]:
            raise InputError(
                f"{self.text.path}: item_keys.offsets expected ascending places of 0..{self.text.shape[0]:,}, got "
                f"others in rows {begin:,}..{end:,}. Write the file again."
            )
        text = self.text.read(bounds[0], bounds[-1]).tobytes()
        return [_decode(text[a - bounds[0] : b - bounds[0]], self.text.path) for a, b in pairwise(bounds)]


def _packed_keys(text: _Array, offsets: _Array) -> _PackedKeys:
    """Keys once it is known that their tensors are such (InputError)."""
    if text.dtype != np.uint8 or offsets.dtype != np.int64 or len(text.shape) != 1 or len(offsets.shape) != 1:
        raise InputError(
            f"{text.path} expected item_keys.bytes [B] uint8 and item_keys.offsets [N+1] int64, got "
            f"{list(text.shape)} {text.dtype} and {list(offsets.shape)} {offsets.dtype}. Write the file again."
        )
    if offsets.shape[0] == 0:
        raise InputError(f"{text.path} expected item_keys.offsets [N+1], got none. Write the file again.")
    return _PackedKeys(text, offsets)


class _KeyLines:
    """The lines of a text file, by number; where every so many of them begin is remembered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begins: list[int] = []
        self._num_lines = place = 0
        with path.open("rb") as file:
            for line in file:
                if self._num_lines % _KEY_STRIDE == 0:
                    self._begins.append(place)
                self._num_lines += 1
                place += len(line)

    def __len__(self) -> int:
        return self._num_lines

    def read(self, begin: int, end: int) -> list[str]:
        if begin >= end:
            return []
        with self._path.open("rb") as file:
            file.seek(self._begins[begin // _KEY_STRIDE])
            lines = islice(file, begin % _KEY_STRIDE, begin % _KEY_STRIDE + end - begin)
            keys = [_decode(line, self._path).removesuffix("\n").removesuffix("\r") for line in lines]
        if len(keys) != end - begin:
            raise InputError(f"{self._path} ends before line {end:,}: it was cut short. Write it again.")
        if begin == 0:
            keys[0] = keys[0].removeprefix("\ufeff")  # as some editors begin a file
        return keys


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: item keys are not UTF-8 ({error}). Write them again as UTF-8.") from error


def _open_parquet(path: Path, files: Sequence[Path]) -> FeatureFile:
    rows = ParquetFeatures(files)
    return FeatureFile(path, rows, rows.read_keys, files)
