"""Amazon 2014 product metadata, as both the P5 archive and the UCSD files carry it, turned into an item table."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sources.records import check_malformed, clean_price, clean_text, line_blocks, parse_record

if TYPE_CHECKING:
    import polars as pl

TEXT_TEMPLATE = (
    "{title}.",
    "Brand: {brand}.",
    "Category: {category}.",
    "Also in: {other_categories}.",
    "Price: {price} dollars.",
    "{description}",
)


def read_amazon_items(path: Path | None, item_keys: list[str], root: str) -> tuple[pl.DataFrame, int]:
    """Item table in the order of `item_keys`, joined with the metadata by asin.

    Args:
        path: metadata lines, or None: all fields are null.
        item_keys: asins that become rows; an asin without metadata keeps its row, with nulls.
        root: name of the category tree's root, such as "Sports & Outdoors".

    Returns:
        The table, with columns `item_key, title, category, other_categories, brand, price, description`, and the
        number of malformed lines.

    Raises:
        InputError: if the file is truncated, or more than one percent of its lines are malformed.
    """
    import polars as pl

    fields, num_malformed = ({}, 0) if path is None else _read_fields(path, set(item_keys), root)
    texts = ("title", "category", "other_categories", "brand")
    schema = {**dict.fromkeys(texts, pl.String), "price": pl.Float64, "description": pl.String}
    rows = [fields.get(key, (None,) * len(schema)) for key in item_keys]
    items = pl.DataFrame(rows, schema=schema, orient="row")
    return items.insert_column(0, pl.Series("item_key", item_keys, dtype=pl.String)), num_malformed


def _read_fields(path: Path, wanted: set[str], root: str) -> tuple[dict[str, tuple[Any, ...]], int]:
    fields: dict[str, tuple[Any, ...]] = {}
    num_lines = num_malformed = 0
    for block in line_blocks(path):
        for line in block.splitlines():
            if not line.strip():
                continue
            num_lines += 1
            record = parse_record(line)
            if record is None or not isinstance(record.get("asin"), str):
                num_malformed += 1
            elif record["asin"] in wanted:
                fields.setdefault(record["asin"], _item_fields(record, root))
    check_malformed(path, num_malformed, num_lines)
    return fields, num_malformed


def _item_fields(record: dict[str, Any], root: str) -> tuple[str | float | None, ...]:
    brand_in_path, paths = _category_paths(record.get("categories"), root)
    main = max(paths, key=len, default=[])
    others = [" > ".join(path) for path in paths if path is not main]
    brand = clean_text(record.get("brand")) or brand_in_path
    return (
        clean_text(record.get("title")),
        " > ".join(main) or None,
        "; ".join(dict.fromkeys(others)) or None,
        None if brand is None or brand.lower() == "unknown" else brand,
        clean_price(record.get("price")),
        clean_text(record.get("description")),
    )


def _category_paths(categories: Any, root: str) -> tuple[str | None, list[list[str]]]:
    """The brand, where it stands alone in front of the root, and the paths that start at the root.

    The P5 archive flattens all paths of a Sports item into one list: it is cut again at each root. Paths of other
    trees count only for an item that has no path from the root.
    """
    if not isinstance(categories, list):
        return None, []
    nested = categories if all(isinstance(path, list) for path in categories) else [categories]
    brand: str | None = None
    rooted: list[list[str]] = []
    foreign: list[list[str]] = []
    for names in nested:
        path = [name for name in map(clean_text, names) if name]
        starts = [index for index, name in enumerate(path) if name == root]
        if not starts:
            foreign.append(path)
            continue
        if starts[0] == 1:
            brand = brand or path[0]
        rooted += [path[begin:end] for begin, end in pairwise([*starts, len(path)])]
    return brand, rooted or foreign
