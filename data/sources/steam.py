"""Reviews and games of Steam, collected at UCSD (Kang & McAuley 2018): one Python dict literal a line.

Users are told apart by the name under their review, as in the papers that use these files: fewer than half of the
reviews have a user id. Times are whole days; the order in the file decides between reviews of one day.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schemas import InputError
from data.sources.base import RawFile, Source, SourceTables
from data.sources.literals import literal_values
from data.sources.records import (
    check_malformed,
    clean_price,
    clean_text,
    line_blocks,
    parse_record,
    whole_characters,
)

if TYPE_CHECKING:
    import polars as pl

TEXT_TEMPLATE = (
    "This item is called '{title}'.",
    "It is priced at {price}.",
    "It is manufactured by '{publisher}'.",
    "It belongs to the categories of {category}.",
    "Its tags are {tags}.",
)

_DOWNLOADS = "https://cseweb.ucsd.edu/~wckang"
_BLOCK_BYTES = 1 << 24
"""Of reviews that are held as Python objects at a time, which takes several times as much."""
_REVIEW = ("username", "user_id", "product_id", "date")
_ITEM_COLUMNS = ("title", "category", "tags", "specs", "publisher", "developer", "price", "release_date")

_logger = logging.getLogger(__name__)


class Steam(Source):
    """All reviews, each an interaction; without the file of games all items have missing texts."""

    name = "steam"
    text_template = TEXT_TEMPLATE
    local_folders = ("steam",)
    origin = f"{_DOWNLOADS}/ (described at https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data, version 2)"

    def raw_files(self) -> list[RawFile]:
        """Reviews and games, also unpacked."""
        return [
            RawFile(f"{name}.gz", f"{_DOWNLOADS}/{name}.gz", optional=optional, alternatives=(name,))
            for name, optional in (("steam_reviews.json", False), ("steam_games.json", True))
        ]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; item keys are Steam's product ids, in the order of their first review."""
        reviews_file, games_file = self.raw_files()
        reviews, games = reviews_file.find(raw_dir), games_file.find(raw_dir)
        if reviews is None:
            raise InputError(f"{raw_dir} holds no {reviews_file.name}.")
        if games is None:
            _logger.warning("%s: no %s in %s: items have no texts", self.name, games_file.name, raw_dir)
        interactions, bad_reviews = _read_reviews(reviews)
        item_keys = interactions["item_key"].unique(maintain_order=True).to_list()
        items, bad_games = _read_games(games, item_keys)
        return SourceTables(items, interactions, bad_reviews + bad_games)


def _read_reviews(path: Path) -> tuple[pl.DataFrame, int]:
    """User, game and day of every review, and the number of lines that lack one of them or cannot be read."""
    import polars as pl

    tables = [_read_block(block) for block in line_blocks(path, _BLOCK_BYTES)]
    if not tables:
        raise InputError(f"{path} holds no reviews. Fetch it again.")
    reviews = pl.concat(tables)
    whole = reviews.drop_nulls()
    num_malformed = len(reviews) - len(whole)
    check_malformed(path, num_malformed, len(reviews))
    return whole, num_malformed


def _read_block(block: bytes) -> pl.DataFrame:
    """A row per line, with nulls where a line has no such field."""
    import polars as pl

    lines = (line.strip() for line in block.decode("utf-8", errors="replace").split("\n"))
    rows = [_review(literal_values(line, _REVIEW) or {}) for line in lines if line]
    table = pl.DataFrame(rows, schema=dict.fromkeys(("user_key", "item_key", "date"), pl.String), orient="row")
    seconds = pl.col("date").str.to_datetime("%Y-%m-%d", strict=False).dt.epoch("s")
    return table.select("user_key", "item_key", seconds.alias("timestamp"))


def _review(fields: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    user = _text(fields.get("username")) or _text(fields.get("user_id"))
    return user, _text(fields.get("product_id")), _text(fields.get("date"))


def _read_games(path: Path | None, item_keys: list[str]) -> tuple[pl.DataFrame, int]:
    """Item table in the order of `item_keys`, where a game without metadata has nulls, and the number of bad lines."""
    import polars as pl

    fields, num_malformed = ({}, 0) if path is None else _read_fields(path, set(item_keys))
    rows = [fields.get(key, (None,) * len(_ITEM_COLUMNS)) for key in item_keys]
    items = pl.DataFrame(rows, schema=dict.fromkeys(_ITEM_COLUMNS, pl.String), orient="row")
    return items.insert_column(0, pl.Series("item_key", item_keys, dtype=pl.String)), num_malformed


def _read_fields(path: Path, wanted: set[str]) -> tuple[dict[str, tuple[str | None, ...]], int]:
    """Texts per product id, of the first line that has it; a line without id tells of no item."""
    fields: dict[str, tuple[str | None, ...]] = {}
    num_lines = num_malformed = 0
    for block in line_blocks(path):
        for line in filter(bytes.strip, block.split(b"\n")):
            num_lines += 1
            record = parse_record(line)
            if record is None:
                num_malformed += 1
            elif (key := _text(record.get("id"))) in wanted and key not in fields:
                fields[key] = _game(record)
    check_malformed(path, num_malformed, num_lines)
    return fields, num_malformed


def _game(record: dict[str, Any]) -> tuple[str | None, ...]:
    """Texts in the order of _ITEM_COLUMNS; genres are a set, not a path."""
    publisher, developer = clean_text(record.get("publisher")), clean_text(record.get("developer"))
    return (
        clean_text(record.get("title")) or clean_text(record.get("app_name")),
        *(_listed(record.get(name)) for name in ("genres", "tags", "specs")),
        publisher or developer,
        developer,
        _price(record.get("price")),
        clean_text(record.get("release_date")),
    )


def _listed(names: Any) -> str | None:
    texts = [clean_text(name) for name in names] if isinstance(names, list) else []
    return ", ".join(filter(None, texts)) or None


def _price(price: Any) -> str | None:
    """Such as "4.99 dollars" or "Free To Play"."""
    number = clean_price(price)
    return clean_text(price) if number is None else f"{number:g} dollars"


def _text(value: Any) -> str | None:
    """A name or id as text, None where there is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return str(value)
    return whole_characters(value).strip() or None if isinstance(value, str) else None
