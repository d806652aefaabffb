"""The feature store: one matrix [N, D] per dataset and way of encoding it, made once and memory-mapped ever after.

`{root}/features/{dataset}/{key}/` holds `features.npy` and `manifest.json`, where the key is a hash of all that decides
the values: the encoder and its settings, the text template and the item table. Other settings make another folder, so
nothing stale can be read. Where some items have nothing to encode, `missing.npy` says which. Reading needs numpy alone.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.encoders import Encoder, EncoderInput, build_encoder
from data.files import cannot_write, exclusive, json_sha256, replaced_folder
from data.parquet_features import examples
from data.processed import PreparedDataset
from data.schemas import InputError

FORMAT_VERSION = 1
"""Of the feature folder; raised whenever its layout or the meaning of its content changes."""

_CHECKED_ROWS = 65_536
"""Rows looked at once, so that memory does not grow with their number."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How items become features. Settings of other encoders than the chosen one have no effect.

    Attributes:
        encoder: "sentence_transformers", "tfidf_svd" or "file".
        model: of sentence_transformers: a Hub id or a local folder.
        dim: of tfidf_svd: number of features.
        template: of both text encoders: sentences over columns of the item table; None: the source's own.
        path: of file: a .npy (with .keys.txt), .safetensors or .parquet file; see data/encoders/external.py.
        missing: of file: "error" refuses a file that lacks items, "vector" gives these a row of zeros, marked as
            missing, for which a model that reads features learns a vector; no tokenizer is trained on them.
        batch_size: of sentence_transformers: texts at a time; does not decide the values.
    """

    encoder: str = "sentence_transformers"
    model: str | None = None
    dim: int | None = None
    template: tuple[str, ...] | None = None
    path: str | None = None
    missing: Literal["error", "vector"] = "error"
    batch_size: int = 256


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Features of all items.

    Attributes:
        values: [N, D] float32, memory-mapped; row i belongs to item_id i.
        missing: [N] bool, true for items that have nothing to encode: no text, or no row in the user's file. A text
            encoder has encoded a sentence for them that says so, a file gives them zeros.
        description: what made them (encoder, its settings, template, item_table_hash, num_items, width), and
            num_missing, the number of missing items.
    """

    values: np.ndarray
    missing: np.ndarray
    description: dict[str, Any]


def load_item_features(dataset: PreparedDataset, config: FeatureConfig) -> ItemFeatures:
    """The features that a config describes, encoded on first use; a warning says how many items have none.

    Raises:
        InputError: if the encoder, its model or its file is missing or does not fit the items, the template names an
            unknown column, a feature is NaN or infinite, or nothing can be written.
    """
    encoder = build_encoder(config)
    template = (config.template or dataset.text_template) if encoder.reads_texts else None
    request = _request(dataset, config, encoder, template)
    folder = dataset.folder.parent.parent / "features" / dataset.name / _key(request)
    features = _read(folder)
    if features is None:
        with exclusive(folder):
            features = _read(folder) or _encode(dataset, encoder, template, request, folder)
    _warn_of_missing(features, dataset)
    return features


def _warn_of_missing(features: ItemFeatures, dataset: PreparedDataset) -> None:
    rows = np.flatnonzero(features.missing).tolist()
    if rows:
        what = "text" if features.description["template"] else "row in the file of features"
        keys = examples([dataset.catalogue.item_keys[row] for row in rows])
        _logger.warning("%s: %d of %d items have no %s: %s", dataset.name, len(rows), len(features.missing), what, keys)


def _request(
    dataset: PreparedDataset, config: FeatureConfig, encoder: Encoder, template: tuple[str, ...] | None
) -> dict[str, Any]:
    """All that decides the values, as it comes back from JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "encoder": config.encoder,
        **encoder.settings(),
        "template": None if template is None else list(template),
        "item_table_hash": dataset.item_table_hash,
    }


def _key(request: dict[str, Any]) -> str:
    return json_sha256(request)


def _read(folder: Path) -> ItemFeatures | None:
    """The features of a folder, or None when they are missing or damaged."""
    try:
        description = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        values = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
        shape = (description["num_items"], description["width"])
        missing = _read_missing(folder, description)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        _logger.warning("%s is damaged (%s); encoding again", folder, error)
        return None
    if values.shape != shape or values.dtype != np.float32:
        _logger.warning(
            "%s is damaged (features of shape %s, expected %s); encoding again", folder, values.shape, shape
        )
        return None
    return ItemFeatures(values, missing, description)


def _read_missing(folder: Path, description: dict[str, Any]) -> np.ndarray:
    """[N] bool; ValueError where it is not of the items that the manifest describes."""
    if not description["num_missing"]:
        return np.zeros(description["num_items"], dtype=bool)
    missing = np.load(folder / "missing.npy", allow_pickle=False)
    if missing.shape != (description["num_items"],) or missing.sum() != description["num_missing"]:
        raise ValueError(f"missing.npy does not name {description['num_missing']} of {description['num_items']} items")
    return missing


def _encode(
    dataset: PreparedDataset,
    encoder: Encoder,
    template: tuple[str, ...] | None,
    request: dict[str, Any],
    folder: Path,
) -> ItemFeatures:
    """Encodes and stores; what a killed run has left in the scratch folder is used."""
    texts = [] if template is None else dataset.item_texts(template)
    scratch = folder.with_name(f".{folder.name}.partial")
    try:
        items = EncoderInput(dataset.catalogue.item_keys, texts)
        missing = encoder.missing(items)
        values = encoder.encode(items, scratch)
        try:
            _check(values, dataset, request)
        except InputError:
            shutil.rmtree(scratch, ignore_errors=True)  # another try must not resume from bad rows
            raise
        description = {
            **request,
            "num_items": len(values),
            "width": values.shape[1],
            "num_missing": int(missing.sum()),
        }
        with replaced_folder(folder) as temporary:
            np.save(temporary / "features.npy", values)
            if description["num_missing"]:
                np.save(temporary / "missing.npy", missing)
            (temporary / "manifest.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    shutil.rmtree(scratch, ignore_errors=True)
    features = _read(folder)
    assert features is not None
    return features


def _check(values: np.ndarray, dataset: PreparedDataset, request: dict[str, Any]) -> None:
    """Every item has a row of finite numbers."""
    item_keys = dataset.catalogue.item_keys
    if values.shape[0] != len(item_keys):
        raise InputError(f"encoder {request['encoder']!r} gave {values.shape[0]} rows for {len(item_keys)} items.")
    bad = np.concatenate([_broken_rows(values, begin) for begin in range(0, len(values), _CHECKED_ROWS)])
    if len(bad):
        examples = ", ".join(repr(item_keys[row]) for row in bad[:3].tolist())
        raise InputError(
            f"the features of {len(bad)} items hold NaN, infinite or missing numbers ({_origin(request)}): "
            f"{examples}{', ...' if len(bad) > 3 else ''}. Repair or re-compute these rows."
        )


def _broken_rows(values: np.ndarray, begin: int) -> np.ndarray:
    """Numbers of the rows, of a block, that hold NaN or infinity."""
    return begin + np.flatnonzero(~np.isfinite(values[begin : begin + _CHECKED_ROWS]).all(axis=1))


def _origin(request: dict[str, Any]) -> str:
    return request.get("file") or request.get("model") or request["encoder"]
