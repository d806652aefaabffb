"""Prepared datasets: `load_dataset` is the one call that returns one, preparing it on first use.

Reading what was prepared needs torch, numpy and safetensors alone; polars is imported only to prepare and to read
the item table.
"""

import enum
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.files import exclusive, file_sha256, json_sha256
from data.prepare import FORMAT_VERSION, PrepareSettings, prepare
from data.schemas import SPLIT_ROLES, Catalogue, Histories, InputError, Ranges, Split, read_safetensors
from data.sources.base import RawFile, Source
from data.sources.download import ensure_raw_files, find_raw_folder
from data.sources.tables import TablesConfig

SPLIT_NAMES = ("leave_one_out", "liger")

_FILES = (
    "items.parquet",
    "interactions.parquet",
    "users.parquet",
    "histories.safetensors",
    "catalogue.safetensors",
    *(f"splits/{name}.safetensors" for name in SPLIT_NAMES),
)

_logger = logging.getLogger(__name__)


class RecDataset(enum.Enum):
    """Datasets that `load_dataset` knows."""

    AMAZON = "amazon"
    """Amazon 2014 in the layout of the P5 archive; categories beauty, sports, toys."""
    AMAZON_REVIEWS = "amazon_reviews"
    """Raw Amazon 2014 reviews and metadata of UCSD, any category."""
    ML_1M = "ml_1m"
    ML_32M = "ml_32m"
    """MovieLens 32M; also reads a local ml-latest-small."""
    STEAM = "steam"
    """Reviews and games of Steam, as UCSD collected them."""
    TABLES = "tables"
    """A user's own files."""
    DEMO = "demo"
    """Generated, offline."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which dataset, and where it lies.

    Attributes:
        dataset: one of RecDataset.
        category: of AMAZON and AMAZON_REVIEWS.
        root: folder of all prepared datasets, downloads and features.
        raw_dir: local folder with the raw files, or its parent; only read. None: downloads are used.
        split: one of SPLIT_NAMES.
        min_interactions: users and items with fewer are removed until none is left (0 keeps everything), unless
            the source comes filtered.
        seed: of DEMO.
        tables: of TABLES.
    """

    dataset: RecDataset
    category: str | None = None
    root: str = "dataset"
    raw_dir: str | None = None
    split: str = "leave_one_out"
    min_interactions: int = 5
    seed: int = 0
    tables: TablesConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, RecDataset):
            valid = ", ".join(f"RecDataset.{member.name}" for member in RecDataset)
            raise InputError(f"unknown dataset {self.dataset!r}; valid datasets: {valid}.")
        _check_split_name(self.split)
        if self.min_interactions < 0:
            raise InputError(f"min_interactions must be 0 or more, got {self.min_interactions}.")
        if self.category is not None and self.dataset not in (RecDataset.AMAZON, RecDataset.AMAZON_REVIEWS):
            raise InputError(f"{self.dataset.name} has no categories, got category {self.category!r}. Remove it.")
        if (self.tables is not None) != (self.dataset is RecDataset.TABLES):
            raise InputError("DatasetConfig.tables belongs to RecDataset.TABLES: give both or neither.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, without the folder of raw files; `from_dict` reads them back."""
        return asdict(self) | {"dataset": self.dataset.value, "raw_dir": None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DatasetConfig":
        """Inverse of `to_dict`.

        Raises:
            InputError: if the fields describe no dataset of this library.
        """
        try:
            values = {**fields, "dataset": RecDataset(fields["dataset"])}
            if fields.get("tables") is not None:
                tables: dict[str, Any] = fields["tables"]
                lists = {key: tuple(value) for key, value in tables.items() if isinstance(value, list)}
                values["tables"] = TablesConfig(**{**tables, **lists})
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"these fields describe no dataset of this library ({error}): {dict(fields)}.") from error


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """A prepared folder; its parts are read when they are first asked for.

    Attributes:
        folder: where it lies.

    Raises:
        InputError: if the folder is no prepared dataset, is of a newer format, or was replaced while in use.
    """

    folder: Path

    def __post_init__(self) -> None:
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{self.folder} has format version {version}, this library reads version {FORMAT_VERSION}. "
                "Prepare it again, or use the library that wrote it."
            )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Origin, counts and hashes of the dataset."""
        return _read_manifest(self.folder)

    @property
    def name(self) -> str:
        """Of the source."""
        return self.manifest["name"]

    @property
    def text_template(self) -> tuple[str, ...]:
        """The source's sentences for item texts."""
        return tuple(self.manifest["text_template"])

    @property
    def item_table_hash(self) -> str:
        """SHA-256 of the item table's values."""
        return self.manifest["item_table_hash"]

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of what the dataset holds: the same wherever and from whichever folder it was prepared."""
        return _content_hash(self.manifest)

    @cached_property
    def catalogue(self) -> Catalogue:
        """Keys, titles and categories of the items; cold flags are not set, since they depend on the split."""
        return Catalogue.load(self._part("catalogue.safetensors"))

    @cached_property
    def histories(self) -> Histories:
        """All users' interactions."""
        tensors = read_safetensors(self._part("histories.safetensors"))
        return Histories(**{name: tensors[name] for name in Histories.__dataclass_fields__})

    def split(self, name: str) -> Split:
        """A stored split; InputError lists the valid names."""
        _check_split_name(name)
        tensors = read_safetensors(self._part(f"splits/{name}.safetensors"))
        roles = {
            role: Ranges(*(tensors[f"{role}.{column}"] for column in ("rows", "begins", "ends")))
            for role in SPLIT_ROLES
        }
        return Split(name, **roles)

    def item_texts(self, template: tuple[str, ...]) -> list[str]:
        """One text per item, in item order; sentences with missing fields are left out. Needs polars.

        Raises:
            InputError: if the template names a column that the item table lacks.
        """
        import polars as pl

        from data.text import render_texts

        return render_texts(pl.read_parquet(self._part("items.parquet")), template)

    def _part(self, name: str) -> Path:
        """Path of a file of this folder, after a look whether the folder is still the one that was opened."""
        if _content_hash(_read_manifest(self.folder)) != self.manifest_hash:
            raise InputError(
                f"{self.folder} was prepared anew with other content while it was in use. "
                "Start again, or give each run its own DatasetConfig.root."
            )
        return self.folder / name


def load_dataset(config: DatasetConfig) -> PreparedDataset:
    """The dataset, prepared into `{root}/prepared/{name}` unless what lies there is what the config asks for.

    A prepared folder is used as it is when its manifest agrees with the request and with the raw files, or when
    there are no raw files to compare it with.

    Raises:
        InputError: if the dataset or category is unknown, raw files are missing or damaged, or nothing can be written.
    """
    source = build_source(config)
    folder = _prepared_folder(config, source)
    cache_dir = Path(config.root) / "raw" / source.name
    raw_dir = _raw_dir(config)
    request = _request(source, config)
    if _difference(folder, request, source, raw_dir, cache_dir) is not None:
        with exclusive(folder):
            difference = _difference(folder, request, source, raw_dir, cache_dir)
            if difference is not None:  # still so: no other process has prepared it meanwhile
                _logger.info("preparing %s: %s", folder, difference)
                _prepare(source, request, raw_dir, cache_dir, folder)
    if config.raw_dir is not None and source.raw_files() and find_raw_folder(source, raw_dir) is None:
        _logger.warning(
            "DatasetConfig.raw_dir: %s has no raw files of %s; using %s as it was prepared",
            raw_dir,
            source.name,
            folder,
        )
    return PreparedDataset(folder)


def find_prepared(config: DatasetConfig) -> PreparedDataset | None:
    """What lies where `load_dataset` would prepare, whatever it was made of; None when there is nothing to read.

    Raises:
        InputError: if the dataset or category is unknown.
    """
    folder = _prepared_folder(config, build_source(config))
    try:
        return PreparedDataset(folder)
    except InputError:  # nothing there, or of another format
        return None


def build_source(config: DatasetConfig) -> Source:
    """The source that a config names; InputError when its category is unknown."""
    return _SOURCES[config.dataset](config)


def _amazon(config: DatasetConfig) -> Source:
    from data.sources.amazon_p5 import AmazonP5

    return AmazonP5(config.category)


def _amazon_reviews(config: DatasetConfig) -> Source:
    from data.sources.amazon_reviews import AmazonReviews

    return AmazonReviews(config.category)


def _ml_1m(config: DatasetConfig) -> Source:
    from data.sources.movielens import MovieLens1M

    return MovieLens1M()


def _ml_32m(config: DatasetConfig) -> Source:
    from data.sources.movielens import MovieLens32M

    return MovieLens32M()


def _steam(config: DatasetConfig) -> Source:
    from data.sources.steam import Steam

    return Steam()


def _tables(config: DatasetConfig) -> Source:
    from data.sources.tables import Tables

    assert config.tables is not None
    return Tables(config.tables)


def _demo(config: DatasetConfig) -> Source:
    from data.sources.demo import DemoSource

    return DemoSource(config.seed)


_SOURCES: dict[RecDataset, Callable[[DatasetConfig], Source]] = {
    RecDataset.AMAZON: _amazon,
    RecDataset.AMAZON_REVIEWS: _amazon_reviews,
    RecDataset.ML_1M: _ml_1m,
    RecDataset.ML_32M: _ml_32m,
    RecDataset.STEAM: _steam,
    RecDataset.TABLES: _tables,
    RecDataset.DEMO: _demo,
}


def _prepared_folder(config: DatasetConfig, source: Source) -> Path:
    return Path(config.root) / "prepared" / source.name


def _raw_dir(config: DatasetConfig) -> Path | None:
    if config.raw_dir is not None:
        return Path(config.raw_dir).expanduser()
    return Path() if config.dataset is RecDataset.TABLES else None


def _request(source: Source, config: DatasetConfig) -> dict[str, Any]:
    """What decides the content besides the raw files, as it comes back from JSON."""
    if source.already_filtered and config.min_interactions > DatasetConfig.min_interactions:
        _logger.warning("%s comes filtered: min_interactions=%d is ignored", source.name, config.min_interactions)
    request = {
        "source": source.name,
        "source_version": source.version,
        "settings": source.settings(),
        "text_template": source.text_template,
        "min_interactions": 0 if source.already_filtered else config.min_interactions,
    }
    return json.loads(json.dumps(request))


def _difference(
    folder: Path, request: dict[str, Any], source: Source, raw_dir: Path | None, cache_dir: Path
) -> str | None:
    """Why the prepared folder cannot be used, or None when it can."""
    try:
        manifest = _read_manifest(folder)
    except InputError:
        return "nothing is prepared yet"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        return f"{', '.join(missing)} are missing"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"it has format version {manifest.get('format_version')}, {FORMAT_VERSION} is needed"
    for key, wanted in request.items():
        if manifest["request"].get(key) != wanted:
            return f"{key} was {manifest['request'].get(key)!r}, now it is {wanted!r}"
    raw_folder = find_raw_folder(source, raw_dir, cache_dir)
    return None if raw_folder is None else _changed_file(source.raw_files(), raw_folder, manifest["raw_files"])


def _changed_file(files: list[RawFile], raw_folder: Path, recorded: list[dict[str, Any]]) -> str | None:
    """A raw file that differs from what was read; a file is hashed only when its time, but not its size, differs."""
    known = {record["name"]: record for record in recorded}
    for path in filter(None, (file.find(raw_folder) for file in files)):
        record = known.get(_raw_name(path, raw_folder))
        stat = path.stat()
        if record is None or record["size"] != stat.st_size:
            return f"{path} has changed"
        if record["mtime_ns"] != stat.st_mtime_ns and record["sha256"] != file_sha256(path):
            return f"{path} has changed"
    return None


def _prepare(source: Source, request: dict[str, Any], raw_dir: Path | None, cache_dir: Path, folder: Path) -> None:
    raw_folder = ensure_raw_files(source, raw_dir, cache_dir) if source.raw_files() else cache_dir
    paths = filter(None, (file.find(raw_folder) for file in source.raw_files()))
    settings = PrepareSettings(
        name=source.name,
        min_interactions=request["min_interactions"],
        text_template=source.text_template,
        request=request,
        raw_files=[_raw_record(path, raw_folder) for path in paths],
    )
    prepare(source.read(raw_folder), settings, folder)


def _raw_record(path: Path, raw_folder: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "name": _raw_name(path, raw_folder),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": file_sha256(path),
    }


def _raw_name(path: Path, raw_folder: Path) -> str:
    return str(path.relative_to(raw_folder) if path.is_relative_to(raw_folder) else path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a prepared dataset: manifest.json cannot be read ({error}).") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise InputError(f"{folder} is not a prepared dataset: {path.name} is of another kind.")
    return manifest


def _content_hash(manifest: dict[str, Any]) -> str:
    content = {key: manifest[key] for key in ("format_version", "name", "item_table_hash", "histories_hash")}
    return json_sha256(content)


def _check_split_name(name: str) -> None:
    if name not in SPLIT_NAMES:
        raise InputError(f"unknown split {name!r}; valid splits: {', '.join(SPLIT_NAMES)}.")
