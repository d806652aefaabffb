"""Raw Amazon 2014 reviews and metadata of UCSD (McAuley et al. 2015), any category.

The review files are sorted by asin and their times are whole days, so most users have ties: the order in the file
decides between them. A user reviews an item once; a review that the file repeats counts once.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schemas import InputError
from data.sources.amazon_metadata import TEXT_TEMPLATE, read_amazon_items
from data.sources.base import RawFile, Source, SourceTables
from data.sources.records import check_malformed, line_blocks, parse_record

if TYPE_CHECKING:
    import polars as pl

CATEGORIES = (
    "Amazon_Instant_Video",
    "Apps_for_Android",
    "Automotive",
    "Baby",
    "Beauty",
    "Books",
    "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories",
    "Clothing_Shoes_and_Jewelry",
    "Digital_Music",
    "Electronics",
    "Grocery_and_Gourmet_Food",
    "Health_and_Personal_Care",
    "Home_and_Kitchen",
    "Kindle_Store",
    "Movies_and_TV",
    "Musical_Instruments",
    "Office_Products",
    "Patio_Lawn_and_Garden",
    "Pet_Supplies",
    "Sports_and_Outdoors",
    "Tools_and_Home_Improvement",
    "Toys_and_Games",
    "Video_Games",
)

_DOWNLOADS = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"

_logger = logging.getLogger(__name__)


class AmazonReviews(Source):
    """One category of the UCSD 2014 files; without its metadata file all items have missing texts.

    Args:
        category: one of CATEGORIES; upper and lower case and blanks do not matter.

    Raises:
        InputError: if the category is unknown.
    """

    text_template = TEXT_TEMPLATE

    def __init__(self, category: str | None) -> None:
        wanted = (category or "").lower().replace(" ", "_")
        known = {name.lower(): name for name in CATEGORIES}
        if wanted not in known:
            raise InputError(
                f"unknown category {category!r} of AMAZON_REVIEWS; valid categories: {', '.join(CATEGORIES)}."
            )
        self.category = known[wanted]
        self.name = f"amazon-reviews-{wanted.replace('_', '-')}"
        self.local_folders = (self.category,)
        self.origin = f"{_DOWNLOADS}/ (described at https://jmcauley.ucsd.edu/data/amazon/index_2014.html)"

    def raw_files(self) -> list[RawFile]:
        """The 5-core reviews, or locally all reviews, and the metadata."""
        reviews, meta = f"reviews_{self.category}_5.json.gz", f"meta_{self.category}.json.gz"
        all_reviews = (f"reviews_{self.category}.json.gz",)
        return [
            RawFile(reviews, f"{_DOWNLOADS}/{reviews}", alternatives=all_reviews),
            RawFile(meta, f"{_DOWNLOADS}/{meta}", optional=True),
        ]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; item keys are asins, in the order of their first review."""
        reviews_file, meta_file = self.raw_files()
        reviews, meta = reviews_file.find(raw_dir), meta_file.find(raw_dir)
        if reviews is None:
            raise InputError(f"{raw_dir} holds no {reviews_file.name}.")
        if meta is None:
            _logger.warning("%s: no %s in %s: items have no texts", self.name, meta_file.name, raw_dir)
        interactions, bad_reviews = _read_reviews(reviews)
        item_keys = interactions["item_key"].unique(maintain_order=True).to_list()
        root = self.category.replace("_and_", " & ").replace("_", " ")
        items, bad_items = read_amazon_items(meta, item_keys, root)
        return SourceTables(items, interactions, bad_reviews + bad_items)


def _read_reviews(path: Path) -> tuple[pl.DataFrame, int]:
    import polars as pl

    tables = [_read_block(block) for block in line_blocks(path)]
    if not tables:
        raise InputError(f"{path} holds no reviews. Fetch it again.")
    reviews = pl.concat(tables)
    whole = reviews.drop_nulls()
    check_malformed(path, len(reviews) - len(whole), len(reviews))
    return whole.rename({"reviewerID": "user_key", "asin": "item_key", "unixReviewTime": "timestamp"}), len(
        reviews
    ) - len(whole)


def _read_block(block: bytes) -> pl.DataFrame:
    """The three fields of each line, null where a line lacks them or cannot be read."""
    import polars as pl

    schema = {"reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64}
    try:
        return pl.read_ndjson(io.BytesIO(block), schema=schema)
    except pl.exceptions.PolarsError:  # some line is no JSON: Python literals, or damaged
        return pl.DataFrame(list(_rows(block)), schema=schema, orient="row")


def _rows(block: bytes) -> Iterator[tuple[Any, ...]]:
    for line in block.splitlines():
        if line.strip():
            record = parse_record(line) or {}
            user, item, time = (record.get(name) for name in ("reviewerID", "asin", "unixReviewTime"))
            if isinstance(user, str) and isinstance(item, str) and isinstance(time, int):
                yield user, item, time
            else:
                yield None, None, None
