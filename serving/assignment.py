"""Codes of the rows of a feature file of any length, in shards: several processes share them, and kills cost little.

The folder that comes of it holds

manifest.json               what the ids are of; "complete" once all shards are there, with their sha256
ids-00007-of-00100.parquet  item_key, or row where the file has no keys, and code_0, code_1, ... of its rows
.locks                      which processes are at work, until the run is over

Shard s has the rows s * rows_per_shard and on, and belongs to process s % num_processes. It appears under its name when
it is whole, so that the next run of the same request, with as many processes or not, computes those that lack.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from data.files import cannot_write, exclusive, file_sha256, replace_file
from data.schemas import InputError
from modules.tokenizer.stored import naming
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from serving.parts import is_locked, locked
from serving.processes import Share, Watch

KIND = "semantic ids of a feature file"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 100_000

_POLL_SECONDS = 0.1
_CHECKED_ROWS = 8192
_NAMED_ROWS = 3

_logger = logging.getLogger(__name__)


class FeatureRows(Protocol):
    """Features [N, D] that are read in slices, as `data.feature_files.open_features` opens them."""

    path: Path
    shape: tuple[int, ...]
    has_keys: bool

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Consecutive rows."""

    def item_keys(self, begin: int, end: int) -> list[str] | None:
        """Keys of consecutive rows, or None."""

    def content_sha256(self) -> str:
        """Digest of all that the rows and keys are read from."""

    def check_unchanged(self) -> None:
        """InputError where the file was written since it was opened."""


class Assigned(NamedTuple):
    """What one process of a run has come to.

    Attributes:
        num_rows: rows of the whole feature file.
        num_shards: shards of the whole output.
        num_assigned: rows that this process has given codes; the others were there, or belong to other processes.
        seconds: that it took, the digest of the feature file not counted.
    """

    num_rows: int
    num_shards: int
    num_assigned: int
    seconds: float


def assign(
    tokenizer: SemanticIdTokenizer,
    features: FeatureRows,
    output: Path,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> Assigned:
    """Write the codes of all rows, without dedup code, into a folder of shards.

    Computes on the device of the tokenizer's quantizer. Process 0 returns when all shards are there; the others when
    their own are.

    Args:
        tokenizer: gives the codes.
        features: [N, D], made as those that the tokenizer was fitted on.
        output: folder; made if it is missing, continued if a run of the same request has begun it.
        rows_per_shard: the last shard has what is left.
        process_index: number of this process.
        num_processes: that share the shards.
        progress: show a bar on stderr, of this process's shards.

    Raises:
        InputError: if rows are not finite (named, with their shard) or of another width, the folder holds something
            else or the beginning of another request, another process writes it, or it cannot be written.
        LostProcessError: if another process has died, or has not begun.
    """
    if rows_per_shard < 1:
        raise InputError(f"rows_per_shard expected at least 1, got {rows_per_shard}.")
    shards = _Shards(tokenizer, features, output, rows_per_shard)
    with _writing(output), shards.locked(process_index) as locks:
        watch = Watch(locks, Share(process_index, num_processes))
        began, num_assigned = time.monotonic(), 0
        own = range(process_index, len(shards), num_processes)
        for shard in tqdm(own, unit="shard", disable=not progress):
            watch.look()
            if not shards.is_whole(shard):
                num_assigned += shards.write(shard)
        if process_index == 0:
            for shard in range(len(shards)):
                _wait_for(shards, shard, watch)
            shards.finish()
    return Assigned(features.shape[0], len(shards), num_assigned, time.monotonic() - began)


class _Shards:
    """The shards of a request, by number."""

    def __init__(
        self, tokenizer: SemanticIdTokenizer, features: FeatureRows, output: Path, rows_per_shard: int
    ) -> None:
        if tokenizer.rqvae is None:
            raise InputError(
                "the tokenizer's ids were imported: it has no quantizer that could give others. Train one."
            )
        with naming(features.path):
            tokenizer.rqvae.check_width(features.shape)
        self._tokenizer, self._features, self._output = tokenizer, features, output
        self._rows_per_shard = rows_per_shard
        self._columns = [
            "item_key" if features.has_keys else "row",
            *(f"code_{level}" for level in range(len(tokenizer.rqvae.config.codebook_sizes))),
        ]
        self._request = {
            "tokenizer": tokenizer.content_hash,
            "features": features.content_sha256(),
            "num_rows": features.shape[0],
            "rows_per_shard": rows_per_shard,
            "encoder_dtype": tokenizer.manifest.get("encoder_dtype", "float32"),
            "device": next(tokenizer.rqvae.parameters()).device.type,
        }

    def __len__(self) -> int:
        return -(-self._features.shape[0] // self._rows_per_shard)

    def path(self, shard: int) -> Path:
        """Where a shard appears."""
        return self._output / f"ids-{shard:05}-of-{len(self):05}.parquet"

    def rows(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the one behind its last."""
        begin = shard * self._rows_per_shard
        return begin, min(begin + self._rows_per_shard, self._features.shape[0])

    @contextmanager
    def locked(self, rank: int) -> Iterator["_Locks"]:
        """Nobody else writes the shards of process `rank` meanwhile; the folder says what it is for."""
        locks = _Locks(self._output / ".locks", rank)
        with ExitStack() as stack:
            with exclusive(self._output):  # the request is written by whoever comes first, and compared by the others
                self._check_folder()
                stack.enter_context(locked(locks.folder, rank, self._output))
            stack.callback(locks.remove)
            yield locks

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there and can be read."""
        import polars as pl

        path, (begin, end) = self.path(shard), self.rows(shard)
        if not path.exists():
            return False
        try:
            table = pl.read_parquet(path, glob=False)
        except (OSError, pl.exceptions.PolarsError):
            return False
        return table.columns == self._columns and len(table) == end - begin

    def write(self, shard: int) -> int:
        """Give the rows of a shard their codes; returns their number (InputError names rows that are not finite)."""
        import polars as pl

        begin, end = self.rows(shard)
        if self.path(shard).exists():
            _logger.warning("%s is damaged; its codes are computed again", self.path(shard))
        try:
            codes = self._tokenizer.encode(_Part(self._features, begin, end))
        except InputError as error:
            self._check_finite(shard)
            raise InputError(f"{self.path(shard).name}: {error}") from error
        keys = self._features.item_keys(begin, end)
        first = pl.Series(range(begin, end), dtype=pl.Int64) if keys is None else pl.Series(keys, dtype=pl.String)
        columns = [first, *codes.int().numpy().T]
        content = BytesIO()
        pl.DataFrame(dict(zip(self._columns, columns, strict=True))).write_parquet(content)
        self._features.check_unchanged()
        replace_file(self.path(shard), content.getvalue())
        return end - begin

    def finish(self) -> None:
        """Say in the manifest that all shards are there."""
        shards = [
            {"file": path.name, "num_rows": end - begin, "sha256": file_sha256(path)}
            for path, (begin, end) in ((self.path(shard), self.rows(shard)) for shard in range(len(self)))
        ]
        self._write_manifest(complete=True, shards=shards)

    def _write_manifest(self, **progress: Any) -> None:
        manifest = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "request": self._request,
            "columns": self._columns,
            "language": self._tokenizer.language,
            **progress,
        }
        replace_file(self._output / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _check_folder(self) -> None:
        """Begin the folder, or make sure that it is of the same request."""
        self._output.mkdir(parents=True, exist_ok=True)
        if not (self._output / MANIFEST).exists():
            if any(not path.name.startswith(".") for path in self._output.iterdir()):
                raise InputError(f"{self._output} holds other files. Choose a new folder, or an empty one.")
            self._write_manifest(complete=False)
            return
        earlier = _read_request(self._output / MANIFEST)
        other = [f"{name} was {earlier.get(name)!r}, now {value!r}" for name, value in self._request.items()
                 if earlier.get(name) != value]  # fmt: skip
        if other:
            raise InputError(
                f"{self._output} holds ids of an earlier run that was asked for something else: {'; '.join(other)}. "
                "Ask for the same to continue it, or choose a new folder."
            )

    def _check_finite(self, shard: int) -> None:
        """Name the rows of a shard that hold NaN or infinity (InputError)."""
        begin, end = self.rows(shard)
        num_bad = 0
        named: list[str] = []
        for first in range(begin, end, _CHECKED_ROWS):
            block = self._features[first : min(first + _CHECKED_ROWS, end)]
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
            num_bad += len(bad)
            named += [self._name(first + row) for row in bad[: _NAMED_ROWS - len(named)].tolist()]
        if num_bad:
            raise InputError(
                f"{self.path(shard).name}: {num_bad:,} rows of {self._features.path} hold NaN or infinity: "
                f"{', '.join(named)}{', ...' if num_bad > len(named) else '.'} Rebuild these features, and begin in a "
                "new folder."
            )

    def _name(self, row: int) -> str:
        keys = self._features.item_keys(row, row + 1)
        return f"row {row}" if keys is None else f"row {row} (item {keys[0]!r})"


@dataclass(frozen=True)
class _Part:
    """Some rows of a feature file as a matrix of their own."""

    features: FeatureRows
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.features.shape[1]

    def __getitem__(self, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(self.end - self.begin)
        return self.features[self.begin + begin : self.begin + end]


class _Locks(NamedTuple):
    """The lock of each process of a run."""

    folder: Path
    rank: int

    def path(self, kind: str, rank: int) -> Path:
        return self.folder / f"{rank}.{kind}"

    def remove(self) -> None:
        """Leave no trace of this process, whose lock is still held, and of killed ones."""
        own = self.path("lock", self.rank)
        for path in self.folder.glob("*.lock"):
            if path == own or not is_locked(path):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # others have locks there, or it is gone already
            self.folder.rmdir()


def _wait_for(shards: _Shards, shard: int, watch: Watch) -> None:
    """Stay until a shard is there (LostProcessError when the process that it belongs to has died)."""
    began, owner = time.monotonic(), shard % watch.share.num_processes
    while owner != 0:
        alive = watch.lives(owner)
        if shards.is_whole(shard):
            return
        if not alive:
            watch.check(owner, time.monotonic() - began)
        time.sleep(_POLL_SECONDS)


def _read_request(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["kind"] == KIND and manifest["format_version"] == FORMAT_VERSION:
            return dict(manifest["request"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). Choose a new folder.") from error
    raise InputError(f"{path} is not of ids of a feature file, or of a newer version. Choose a new folder.")


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """What goes wrong on the disk meanwhile as an InputError that names the output."""
    try:
        yield
    except OSError as error:
        raise cannot_write(output, error) from error
