"""A user's own tables: interactions and, optionally, items, as csv, parquet or JSON lines. No code to write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data.schemas import InputError
from data.sources.base import RawFile, Source, SourceTables

if TYPE_CHECKING:
    import polars as pl

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet", ".jsonl", ".ndjson")
_ISO_TIME = (
    r"^(?<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?<clock>\d{2}:\d{2})(?<seconds>:\d{2}(?:\.\d{1,9})?)? ?(?<zone>[Zz]|[+-]\d{2}:?\d{2})?)?$"
)
_RESERVED = ("item_id", "item_key", "title", "category")


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Where a user's tables are and what their columns are called.

    Attributes:
        interactions: file with one interaction a row; relative paths start at DatasetConfig.raw_dir, or where the
            script runs.
        items: file with one item a row; None: items are known by their keys alone.
        user_column: in the interactions.
        item_column: in both files.
        time_column: numbers, or dates or date-times as ISO 8601 writes them (without a zone: UTC); None: rows are in
            time order.
        title_column: in the items.
        category_column: in the items; a path is written "A > B > C".
        text_columns: more columns of the items for the text template.
        name: names the prepared folder.
    """

    interactions: str
    items: str | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = "timestamp"
    title_column: str | None = None
    category_column: str | None = None
    text_columns: tuple[str, ...] = ()
    name: str = "tables"


class Tables(Source):
    """A user's own tables; interactions with items that the item table lacks are refused.

    Raises:
        InputError: if the configuration contradicts itself.
    """

    version: ClassVar[int] = 2
    origin = "your own files, named by TablesConfig.interactions and TablesConfig.items"

    def __init__(self, config: TablesConfig) -> None:
        described = [config.title_column, config.category_column, *config.text_columns]
        if config.items is None and any(described):
            raise InputError(
                "TablesConfig names title, category or text columns but no items file. Set TablesConfig.items."
            )
        taken = [name for name in config.text_columns if name in _RESERVED]
        if taken:
            raise InputError(
                f"TablesConfig.text_columns {taken} have reserved names ({', '.join(_RESERVED)}). "
                "Name the title and the category by title_column and category_column, or rename the columns."
            )
        if config.user_column == config.item_column:
            raise InputError(
                f"TablesConfig.user_column and item_column are both {config.item_column!r}. Name two columns."
            )
        if not config.name or Path(config.name).name != config.name or config.name.startswith("."):
            raise InputError(f"TablesConfig.name {config.name!r} must be usable as the name of a folder.")
        self.config = config
        self.name = config.name
        self.text_template = _template(config)

    def settings(self) -> dict[str, Any]:
        """The configuration."""
        return {**asdict(self.config), "text_columns": list(self.config.text_columns)}

    def raw_files(self) -> list[RawFile]:
        """The user's files."""
        return [RawFile(name) for name in (self.config.interactions, self.config.items) if name is not None]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; times with fractions of seconds order the rows before they are cut to seconds."""
        interactions = self._read_interactions(raw_dir / self.config.interactions)
        if self.config.items is None:
            return SourceTables(_bare_items(interactions), interactions)
        return SourceTables(self._read_items(raw_dir / self.config.items), interactions)

    def _read_interactions(self, path: Path) -> pl.DataFrame:
        import polars as pl

        config = self.config
        keys = {"user_key": config.user_column, "item_key": config.item_column}
        wanted = [*keys.values()] + ([config.time_column] if config.time_column else [])
        table = _read(path, wanted)
        log = pl.DataFrame({name: _keys(table[column], path) for name, column in keys.items()})
        if config.time_column is None:
            return log.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64))
        times = _ordered_times(table[config.time_column], path)
        return log.with_columns(times).sort("exact", maintain_order=True).drop("exact")

    def _read_items(self, path: Path) -> pl.DataFrame:
        import polars as pl

        config = self.config
        named = {"title": config.title_column, "category": config.category_column}
        wanted = [config.item_column, *filter(None, named.values()), *config.text_columns]
        table = _read(path, list(dict.fromkeys(wanted)))
        columns = {"item_key": _keys(table[config.item_column], path)}
        for name, column in named.items():
            nothing = pl.Series([None], dtype=pl.String).new_from_index(0, len(table))
            columns[name] = nothing if column is None else _text(table[column], " > ", path)
        return pl.DataFrame(columns | {column: _text(table[column], ", ", path) for column in config.text_columns})


def _template(config: TablesConfig) -> tuple[str, ...]:
    named = {"{title}.": config.title_column, "Category: {category}.": config.category_column}
    sentences = [sentence for sentence, column in named.items() if column]
    sentences += [f"{column.replace('_', ' ').capitalize()}: {{{column}}}." for column in config.text_columns]
    return tuple(sentences) or ("Item {item_key}.",)


def _bare_items(interactions: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    nothing = pl.lit(None, dtype=pl.String)
    keys = interactions.select(pl.col("item_key").unique(maintain_order=True))
    return keys.with_columns(title=nothing, category=nothing)


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    """The named columns."""
    import polars as pl

    frame = _scan(path)
    try:
        available = frame.collect_schema().names()
        missing = [column for column in columns if column not in available]
        if missing:
            raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; columns: {', '.join(available)}.")
        table = frame.select(columns).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} could not be read ({reason}). It may be truncated or of another format.") from error
    if not len(table):
        raise InputError(f"{path} has no rows.")
    return table


def _scan(path: Path) -> pl.LazyFrame:
    """All columns; csv files are not interpreted, so that keys keep their zeros and texts stay as they are written."""
    import polars as pl

    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz", ".tsv")):
        separator = "\t" if name.endswith(".tsv") else ","
        return pl.scan_csv(path, separator=separator, infer_schema=False, glob=False)
    if name.endswith(".parquet"):
        return pl.scan_parquet(path, glob=False)
    if name.endswith((".jsonl", ".ndjson")):
        return pl.scan_ndjson(path, infer_schema_length=None)
    raise InputError(f"{path}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}.")


def _refuse_nulls(column: pl.Series, path: Path) -> None:
    nulls = column.null_count()
    if nulls:
        row = (column.is_null().arg_max() or 0) + 1
        raise InputError(
            f"{path}: column {column.name!r} is empty in {nulls} rows, first in row {row}. Fill or drop them."
        )


def _keys(column: pl.Series, path: Path) -> pl.Series:
    """A column of keys as text, without gaps."""
    import polars as pl

    if column.dtype.is_nested():
        raise InputError(f"{path}: column {column.name!r} holds {column.dtype} values; expected one key a row.")
    _refuse_nulls(column, path)
    return column.cast(pl.String)


def _ordered_times(times: pl.Series, path: Path) -> pl.DataFrame:
    """`exact`, which orders the rows, and `timestamp` in whole seconds (numbers are taken as they are)."""
    import polars as pl

    times = times.fill_nan(None) if times.dtype.is_float() else times
    _refuse_nulls(times, path)
    exact = _parsed_times(times, path) if times.dtype == pl.String else times
    if exact.dtype.is_numeric():
        seconds = exact.floor() if exact.dtype.is_float() else exact
    elif exact.dtype in (pl.Date, pl.Datetime):
        exact = exact.cast(pl.Datetime("us")) if exact.dtype == pl.Date else exact
        seconds = exact.dt.epoch("s")
    else:
        raise _no_times(times, 0, path)
    whole = seconds.cast(pl.Int64, strict=False)
    if whole.null_count():
        raise _no_times(times, whole.is_null().arg_max() or 0, path)
    return pl.DataFrame({"exact": exact, "timestamp": whole})


def _parsed_times(times: pl.Series, path: Path) -> pl.Series:
    """Numbers or date-times from text. Other than ISO 8601 is refused: 01/02/2020 is two days, by whom one asks."""
    import polars as pl

    for number in (pl.Int64, pl.Float64):
        parsed = times.cast(number, strict=False)
        if not parsed.null_count():
            return parsed.fill_nan(None)
    if parsed.null_count() < len(times):  # numbers but for some
        raise _no_times(times, parsed.is_null().arg_max() or 0, path)
    parts = times.str.extract_groups(_ISO_TIME).struct.unnest()
    whole = parts.select(
        pl.concat_str(
            "date",
            pl.lit("T"),
            pl.col("clock").fill_null("00:00"),
            pl.col("seconds").fill_null(":00"),
            pl.col("zone").str.replace("[Zz]", "+00:00").fill_null("+00:00"),
        )
    ).to_series()
    parsed = whole.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False)
    if parsed.null_count():
        raise _no_times(times, parsed.is_null().arg_max() or 0, path)
    return parsed


def _no_times(times: pl.Series, row: int, path: Path) -> InputError:
    return InputError(
        f"{path}: column {times.name!r} holds {times[row]!r} ({times.dtype}) in row {row + 1}; expected numbers, "
        "or dates or date-times such as 2020-12-31 or 2020-12-31T23:59:59Z (ISO 8601). Convert it, or set "
        "TablesConfig.time_column = None if rows are in time order."
    )


def _text(column: pl.Series, separator: str, path: Path) -> pl.Series:
    """A column as text, lists joined."""
    import polars as pl

    if isinstance(column.dtype, pl.List) and not column.dtype.inner.is_nested():
        return column.cast(pl.List(pl.String)).list.join(separator)
    if column.dtype.is_nested():
        raise InputError(
            f"{path}: column {column.name!r} holds {column.dtype} values; expected text, numbers or lists."
        )
    return column.cast(pl.String)
