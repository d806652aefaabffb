"""Two tables of a source become a prepared dataset: a folder that training reads with torch and numpy alone.

Histories are ordered by (timestamp, original row) with a stable sort: between equal timestamps, which Amazon's whole
days are full of, the order of the raw file decides. A row that repeats an earlier one exactly (same user, item and
timestamp) is dropped before anything is counted; the same item at another time stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.files import replaced_folder
from data.schemas import SPLIT_ROLES, Catalogue, Histories, InputError, Ranges, Split, user_hashes
from data.sources.base import SourceTables

if TYPE_CHECKING:
    import polars as pl

FORMAT_VERSION = 1
"""Of the prepared folder; raised whenever its layout or the meaning of its content changes."""

LIGER_HISTORY = 20
"""The `liger` protocol cuts every sequence to its last 20 items before splitting."""

MIN_SPLIT_LENGTH = 3
"""A history needs a target for testing, one for validation and something to train on."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """How tables are prepared, and what the manifest tells of their origin.

    Attributes:
        name: the source's.
        min_interactions: every user and item keeps at least so many interactions (k-core, to a fixpoint); 1 drops
            items nobody touched; 0 keeps everything.
        text_template: the source's.
        request: what the prepared folder is compared with when it is asked for again.
        raw_files: name, size, mtime_ns and sha256 of each raw file that was read.
    """

    name: str
    min_interactions: int
    text_template: tuple[str, ...]
    request: dict[str, Any]
    raw_files: list[dict[str, Any]]


def prepare(tables: SourceTables, settings: PrepareSettings, folder: Path) -> None:
    """Writes the prepared dataset, atomically: `folder` holds the whole of it or what it held before.

    To be called inside `data.files.exclusive(folder)`. Users with fewer than three interactions train with all of
    their items and are neither validated nor tested.

    Args:
        tables: what the source read.
        settings: see PrepareSettings.
        folder: where the prepared dataset will be.

    Raises:
        InputError: if the tables contradict each other, nothing is left after filtering, no user has three
            interactions, or the folder cannot be written.
    """
    items, users, log, counts = _filtered(tables, settings.min_interactions)
    histories = _histories(users, log)
    counts |= _counts(items, histories)
    _check_lengths(counts, settings.name)
    splits = build_splits(histories)
    manifest = _manifest(items, histories, splits, counts, settings)
    with replaced_folder(folder) as temporary:
        _write_tables(items, users, log, temporary)
        _write_tensors(_catalogue(items), histories, splits, temporary)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def k_core(user_ids: np.ndarray, item_ids: np.ndarray, k: int) -> np.ndarray:
    """Which interactions remain when users and items with fewer than k are removed until none is left.

    Args:
        user_ids: [T] non-negative integers.
        item_ids: [T] likewise.
        k: minimum number of interactions.

    Returns:
        [T] bool.
    """
    kept = np.arange(len(user_ids))
    users, items = user_ids, item_ids
    while len(kept):
        enough = (np.bincount(users) >= k)[users] & (np.bincount(items) >= k)[items]
        if enough.all():
            break
        kept, users, items = kept[enough], users[enough], items[enough]
    mask = np.zeros(len(user_ids), dtype=bool)
    mask[kept] = True
    return mask


def build_splits(histories: Histories) -> dict[str, Split]:
    """The stored splits: `leave_one_out`, and `liger`, which first cuts every history to its last 20 items."""
    lengths = np.diff(histories.offsets.numpy())
    return {
        "leave_one_out": _leave_one_out("leave_one_out", lengths, np.zeros_like(lengths)),
        "liger": _leave_one_out("liger", lengths, np.maximum(lengths - LIGER_HISTORY, 0)),
    }


def _leave_one_out(name: str, lengths: np.ndarray, begins: np.ndarray) -> Split:
    """Last item tests, last but one validates, the rest trains; short histories only train."""
    rows = np.arange(len(lengths))
    long_enough = lengths >= MIN_SPLIT_LENGTH
    train_ends = np.where(long_enough, lengths - 3, lengths - 1)
    tested = rows[long_enough]
    return Split(
        name,
        train=_ranges(rows, begins, train_ends),
        valid=_ranges(tested, begins[tested], lengths[tested] - 2),
        test=_ranges(tested, begins[tested], lengths[tested] - 1),
    )


def _ranges(*columns: np.ndarray) -> Ranges:
    return Ranges(*(torch.from_numpy(column.astype(np.int32)) for column in columns))


def _filtered(
    tables: SourceTables, min_interactions: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Items, users and interactions with contiguous ids, the latter in order, and what was dropped on the way."""
    _check_items(tables.items)
    num_raw = len(tables.interactions)
    user_keys, log = _encoded(tables)
    log = _without_repeats(log.sort("user_id", "timestamp", maintain_order=True))
    num_repeated = num_raw - len(log)
    log = log.filter(k_core(log["user_id"].to_numpy(), log["item_id"].to_numpy(), min_interactions))
    num_filtered = num_raw - num_repeated - len(log)
    if not len(log):
        raise InputError(
            f"no interaction is left: {num_raw} were read, and no users and items have {min_interactions} each. "
            "Lower DatasetConfig.min_interactions."
        )
    kept_items = np.bincount(log["item_id"].to_numpy(), minlength=len(tables.items)) >= min_interactions
    kept_users = np.bincount(log["user_id"].to_numpy(), minlength=len(user_keys)) > 0
    log = _renumbered(_renumbered(log, "item_id", kept_items), "user_id", kept_users)
    items = tables.items.filter(kept_items).with_row_index("item_id")
    users = _user_table(user_keys.filter(kept_users))
    dropped = {"repeated_rows": num_repeated, "filtered_rows": num_filtered, "malformed_lines": tables.num_malformed}
    return items, users, log, dropped


def _check_items(items: pl.DataFrame) -> None:
    keys = items["item_key"]
    if keys.n_unique() < len(keys):
        repeated = keys.filter(keys.is_duplicated()).unique(maintain_order=True)
        raise InputError(
            f"the item table has {len(keys)} rows but {keys.n_unique()} distinct keys; repeated: "
            f"{_examples(repeated)}. Keep one row per item."
        )


def _encoded(tables: SourceTables) -> tuple[pl.Series, pl.DataFrame]:
    """User keys in order of appearance, and the interactions with positions instead of keys."""
    import polars as pl

    user_keys = tables.interactions["user_key"].unique(maintain_order=True)
    log = tables.interactions.select(
        _positions("user_key", user_keys).alias("user_id"),
        _positions("item_key", tables.items["item_key"]).alias("item_id"),
        "timestamp",
    )
    if log["item_id"].null_count():
        unknown = tables.interactions["item_key"].filter(log["item_id"].is_null())
        raise InputError(
            f"{len(unknown)} interactions have items that the item table lacks ({unknown.n_unique()} items): "
            f"{_examples(unknown.unique(maintain_order=True))}. Add rows for these items (other columns may be "
            "empty) or remove the interactions."
        )
    return user_keys, log.cast({"user_id": pl.Int32, "item_id": pl.Int32})


def _positions(column: str, keys: pl.Series) -> pl.Expr:
    import polars as pl

    return pl.col(column).cast(pl.Enum(keys), strict=False).to_physical()


def _examples(keys: pl.Series) -> str:
    return ", ".join(map(repr, keys.head(3).to_list())) + (", ..." if len(keys) > 3 else "")


def _without_repeats(log: pl.DataFrame) -> pl.DataFrame:
    """Rows that repeat an earlier (user, item, timestamp) are dropped; only rows with tied times are compared."""
    import polars as pl

    same = [(pl.col(name) == pl.col(name).shift()).fill_null(False) for name in ("user_id", "timestamp")]
    tied = log.select(tied=same[0] & same[1])["tied"]
    suspects = tied | tied.shift(-1, fill_value=False)
    repeated = np.zeros(len(log), dtype=bool)
    repeated[suspects.arg_true().to_numpy()] = (
        ~log.filter(suspects)
        .select(pl.struct("user_id", "item_id", "timestamp").is_first_distinct())
        .to_series()
        .to_numpy()
    )
    return log.filter(~repeated) if repeated.any() else log


def _renumbered(log: pl.DataFrame, column: str, kept: np.ndarray) -> pl.DataFrame:
    """Ids without gaps, in the same order."""
    import polars as pl

    new_ids = np.cumsum(kept, dtype=np.int32) - np.int32(1)
    return log.with_columns(pl.Series(column, new_ids[log[column].to_numpy()]))


def _user_table(user_keys: pl.Series) -> pl.DataFrame:
    import polars as pl

    columns = {"user_key": user_keys, "user_hash": user_hashes(user_keys.to_list())}
    return pl.DataFrame(columns).with_row_index("user_id")


def _histories(users: pl.DataFrame, log: pl.DataFrame) -> Histories:
    lengths = np.bincount(log["user_id"].to_numpy(), minlength=len(users))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = (offsets, log["item_id"].to_numpy(), log["timestamp"].to_numpy(), users["user_hash"].to_numpy())
    return Histories(*(torch.from_numpy(np.array(column)) for column in columns))


def _catalogue(items: pl.DataFrame) -> Catalogue:
    return Catalogue(
        item_keys=items["item_key"].to_list(),
        titles=items["title"].fill_null("").to_list(),
        categories=items["category"].fill_null("").to_list(),
    )


def _counts(items: pl.DataFrame, histories: Histories) -> dict[str, int]:
    short = int((histories.offsets.diff() < MIN_SPLIT_LENGTH).sum())
    sizes = {"users": histories.num_users, "items": len(items), "interactions": len(histories.item_ids)}
    return {**sizes, "users_with_fewer_than_3": short}


def _check_lengths(counts: dict[str, int], name: str) -> None:
    short, num_users = counts["users_with_fewer_than_3"], counts["users"]
    if short == num_users:
        raise InputError(
            f"{name}: none of the {num_users} users has {MIN_SPLIT_LENGTH} interactions, so nothing can be "
            "validated or tested. Use data with longer histories."
        )
    if short:
        _logger.warning("%s: %d of %d users have fewer than 3 interactions; they only train", name, short, num_users)


def _write_tables(items: pl.DataFrame, users: pl.DataFrame, log: pl.DataFrame, folder: Path) -> None:
    import polars as pl

    try:
        for name, table in (("items", items), ("users", users), ("interactions", log)):
            table.write_parquet(folder / f"{name}.parquet")
    except pl.exceptions.PolarsError as error:
        raise OSError(f"polars: {error}") from error


def _write_tensors(catalogue: Catalogue, histories: Histories, splits: dict[str, Split], folder: Path) -> None:
    (folder / "splits").mkdir()
    try:
        catalogue.save(folder / "catalogue.safetensors")
        columns = {name: getattr(histories, name) for name in Histories.__dataclass_fields__}
        save_file(columns, folder / "histories.safetensors")
        for split in splits.values():
            save_file(_split_tensors(split), folder / "splits" / f"{split.name}.safetensors")
    except SafetensorError as error:
        raise OSError(f"safetensors: {error}") from error


def _split_tensors(split: Split) -> dict[str, torch.Tensor]:
    columns = ("rows", "begins", "ends")
    return {f"{role}.{name}": getattr(split.role(role), name) for role in SPLIT_ROLES for name in columns}


def _manifest(
    items: pl.DataFrame,
    histories: Histories,
    splits: dict[str, Split],
    counts: dict[str, int],
    settings: PrepareSettings,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "request": settings.request,
        "raw_files": settings.raw_files,
        "counts": counts,
        "splits": {name: {role: len(split.role(role)) for role in SPLIT_ROLES} for name, split in splits.items()},
        "order": "timestamp, then row of the raw file",
        "text_template": list(settings.text_template),
        "item_table_hash": _item_table_hash(items),
        "histories_hash": _histories_hash(histories),
    }


def _item_table_hash(items: pl.DataFrame) -> str:
    """Of the values alone, so that it does not depend on how parquet is written."""
    digest = hashlib.sha256(json.dumps(items.columns).encode())
    for row in items.iter_rows():
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()


def _histories_hash(histories: Histories) -> str:
    digest = hashlib.sha256()
    for name in Histories.__dataclass_fields__:
        digest.update(getattr(histories, name).numpy())
    return digest.hexdigest()
