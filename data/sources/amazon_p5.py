"""Amazon 2014, 5-core, in the layout of the P5 archive (Geng et al. 2022): Beauty, Sports, Toys.

`sequential_data.txt` holds one user a line, `user item item ...`, numbers from 1, in time order; `datamaps.json` maps
the original ids to those numbers; `meta.json.gz` holds one Python dict literal a line. There are no timestamps: the
position in the history stands for the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data.schemas import InputError
from data.sources.amazon_metadata import TEXT_TEMPLATE, read_amazon_items
from data.sources.base import RawFile, Source, SourceTables
from data.sources.records import check_ends_with_newline, opened, read_json_object

if TYPE_CHECKING:
    import polars as pl

CATEGORIES = {"beauty": "Beauty", "sports": "Sports & Outdoors", "toys": "Toys & Games"}
"""Valid categories and the roots of their category trees."""


class AmazonP5(Source):
    """One category of the P5 archive.

    Args:
        category: one of CATEGORIES.

    Raises:
        InputError: if the category is unknown.
    """

    text_template = TEXT_TEMPLATE
    already_filtered: ClassVar[bool] = True

    def __init__(self, category: str | None) -> None:
        if category not in CATEGORIES:
            raise InputError(f"unknown category {category!r} of AMAZON; valid categories: {', '.join(CATEGORIES)}.")
        self.category = category
        self.name = f"amazon-{category}"
        self.local_folders = (category,)
        self.origin = (
            "P5_data.zip of the P5 authors, https://drive.google.com/file/d/1qGxgmx7G_WB7JE4Cn_bEcZ_o_NAJLE3G "
            f"(linked from https://github.com/jeykigung/P5); they are in its folder data/{category}"
        )

    def raw_files(self) -> list[RawFile]:
        """The three files of the category's folder; the archive has no stable direct address."""
        return [RawFile("sequential_data.txt"), RawFile("datamaps.json"), RawFile("meta.json.gz")]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; item keys are asins, user keys are Amazon's reviewer ids."""
        self._check_folder(raw_dir)
        user_keys, item_keys = _read_datamaps(raw_dir / "datamaps.json")
        interactions = _read_sequences(raw_dir / "sequential_data.txt", user_keys, item_keys)
        root = CATEGORIES[self.category]
        items, num_malformed = read_amazon_items(raw_dir / "meta.json.gz", list(item_keys.values()), root)
        return SourceTables(items, interactions, num_malformed)

    def _check_folder(self, raw_dir: Path) -> None:
        other = raw_dir.resolve().name.lower()
        if other in CATEGORIES and other != self.category:
            raise InputError(
                f"category is {self.category!r} but the raw files in {raw_dir} are those of {other!r}. "
                f"Set DatasetConfig.raw_dir to the {self.category} folder or to its parent."
            )


def _read_datamaps(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Original ids by number, for users and for items."""
    content = read_json_object(path)
    maps = [content.get(name) for name in ("user2id", "item2id")]
    if not all(isinstance(mapping, dict) and mapping for mapping in maps):
        raise InputError(f"{path} expected the maps user2id and item2id, got the keys {sorted(content)}.")
    users, items = ({str(number): key for key, number in mapping.items()} for mapping in maps if mapping)
    return users, items


def _read_sequences(path: Path, user_keys: dict[str, str], item_keys: dict[str, str]) -> pl.DataFrame:
    import polars as pl

    check_ends_with_newline(path)
    with opened(path) as stream:
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    parts = pl.Series("line", lines, dtype=pl.String).str.extract_all(r"\S+")
    rows = pl.DataFrame({"row": range(1, len(lines) + 1), "parts": parts}).filter(pl.col("parts").list.len() > 0)
    rows = rows.with_columns(user=pl.col("parts").list.first(), number=pl.col("parts").list.slice(1))
    # The archive was published with numbers and, later, with reviewer ids in the user column.
    written_users = {key: key for key in user_keys.values()} | user_keys
    rows = rows.with_columns(user_key=_original_ids(rows["user"], written_users))
    _check_users(rows, path, len(user_keys))
    log = rows.select("row", "user_key", "number").explode("number").drop_nulls("number")
    log = log.with_columns(item_key=_original_ids(log["number"], item_keys))
    _check_item_numbers(log, path)
    order = pl.int_range(pl.len(), dtype=pl.Int64).over("row")
    return log.select("user_key", "item_key", timestamp=order)


def _original_ids(written: pl.Series, originals: dict[str, str]) -> pl.Series:
    """Original ids of what the file writes, null where it is not in the map."""
    import polars as pl

    return written.replace_strict(originals, default=None, return_dtype=pl.String)


def _check_users(rows: pl.DataFrame, path: Path, num_users: int) -> None:
    unknown = rows.filter(rows["user_key"].is_null())
    if len(unknown):
        raise InputError(
            f"{path} line {unknown['row'][0]}: user {unknown['user'][0]!r} is not in datamaps.json "
            f"({len(unknown)} such lines). Take all files from the same archive folder."
        )
    if len(rows) != num_users or rows["user_key"].n_unique() != num_users:
        raise InputError(
            f"{path} expected one line for each of the {num_users} users of datamaps.json, got {len(rows)} lines for "
            f"{rows['user_key'].n_unique()} users: the file is truncated or of another archive. Fetch it again."
        )


def _check_item_numbers(log: pl.DataFrame, path: Path) -> None:
    unknown = log.filter(log["item_key"].is_null())
    if len(unknown):
        raise InputError(
            f"{path} line {unknown['row'][0]}: item number {unknown['number'][0]!r} is not in datamaps.json "
            f"({len(unknown)} such interactions). Take all files from the same archive folder."
        )
