"""MovieLens 1M and 32M (Harper & Konstan 2015): ratings taken as interactions, whatever their value.

MovieLens 32M comes as csv files; its reader also takes ml-latest-small, which has the same files. MovieLens 1M comes
as `::`-separated lines, its titles in ISO-8859-1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data.schemas import InputError
from data.sources.base import RawFile, Source, SourceTables
from data.sources.records import check_ends_with_newline, opened

if TYPE_CHECKING:
    import polars as pl

TEXT_TEMPLATE = ("{title}.", "Genres: {category}.")

_DOWNLOADS = "https://files.grouplens.org/datasets/movielens"
_ML_1M_SHA256 = "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"
_ML_32M_SHA256 = "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee"


class MovieLens1M(Source):
    """Ratings and movies of ml-1m.zip."""

    name = "ml-1m"
    text_template = TEXT_TEMPLATE
    local_folders = ("ml-1m",)
    origin = f"{_DOWNLOADS}/ml-1m.zip"

    def raw_files(self) -> list[RawFile]:
        """Two members of the archive."""
        return [RawFile(name, self.origin, f"ml-1m/{name}", _ML_1M_SHA256) for name in ("ratings.dat", "movies.dat")]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; item keys are MovieLens movie ids."""
        return SourceTables(_read_movies_dat(raw_dir / "movies.dat"), _read_ratings_dat(raw_dir / "ratings.dat"))


class MovieLens32M(Source):
    """Ratings and movies of ml-32m.zip, or of a local ml-latest-small."""

    name = "ml-32m"
    text_template = TEXT_TEMPLATE
    local_folders = ("ml-32m", "ml-latest-small")
    origin = f"{_DOWNLOADS}/ml-32m.zip"

    def raw_files(self) -> list[RawFile]:
        """Two members of the archive."""
        return [RawFile(name, self.origin, f"ml-32m/{name}", _ML_32M_SHA256) for name in ("ratings.csv", "movies.csv")]

    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables; item keys are MovieLens movie ids."""
        return SourceTables(_read_movies_csv(raw_dir / "movies.csv"), _read_ratings_csv(raw_dir / "ratings.csv"))


def _read_ratings_csv(path: Path) -> pl.DataFrame:
    import polars as pl

    check_ends_with_newline(path)
    types = {"userId": pl.String, "movieId": pl.String, "rating": pl.Float32, "timestamp": pl.Int64}
    try:
        ratings = pl.scan_csv(path, schema_overrides=types)
        columns = {"user_key": "userId", "item_key": "movieId", "timestamp": "timestamp"}
        log = ratings.select(**{name: pl.col(column) for name, column in columns.items()}).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, "userId,movieId,rating,timestamp", error) from error
    return _without_gaps(log, path)


def _read_movies_csv(path: Path) -> pl.DataFrame:
    import polars as pl

    check_ends_with_newline(path)
    types = {"movieId": pl.String, "title": pl.String, "genres": pl.String}
    try:
        movies = pl.read_csv(path, schema_overrides=types, columns=list(types))
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, "movieId,title,genres", error) from error
    return _item_table(movies["movieId"], movies["title"], movies["genres"])


def _read_ratings_dat(path: Path) -> pl.DataFrame:
    import polars as pl

    check_ends_with_newline(path)
    names = ["user_key", "gap1", "item_key", "gap2", "rating", "gap3", "timestamp"]
    types = dict.fromkeys(names, pl.String) | {"timestamp": pl.Int64}
    try:  # one-character separator: every other column lies between the two colons and is empty
        log = pl.read_csv(path, has_header=False, separator=":", quote_char=None, schema=types)
    except pl.exceptions.PolarsError as error:
        raise _unreadable(path, "UserID::MovieID::Rating::Timestamp", error) from error
    return _without_gaps(log.select("user_key", "item_key", "timestamp"), path)


def _read_movies_dat(path: Path) -> pl.DataFrame:
    import polars as pl

    check_ends_with_newline(path)
    with opened(path) as stream:
        lines = stream.read().decode("iso-8859-1").splitlines()
    parts = pl.DataFrame({"line": lines}).select(pl.col("line").str.split_exact("::", 2)).unnest("line")
    if parts["field_2"].null_count():
        line = parts["field_2"].is_null().arg_max()
        raise InputError(f"{path} line {(line or 0) + 1}: expected MovieID::Title::Genres. Fetch the file again.")
    return _item_table(*parts.get_columns())


def _item_table(movie_id: pl.Series, title: pl.Series, genres: pl.Series) -> pl.DataFrame:
    """Items with the genres as category; they are a set, not a path."""
    import polars as pl

    named = pl.DataFrame({"item_key": movie_id, "title": title.str.strip_chars(), "genres": genres})
    category = pl.when(pl.col("genres") != "(no genres listed)").then(
        pl.col("genres").str.replace_all("|", ", ", literal=True)
    )
    return named.select("item_key", "title", category.alias("category"))


def _without_gaps(log: pl.DataFrame, path: Path) -> pl.DataFrame:
    gaps = log.null_count().sum_horizontal()[0]
    if gaps or not len(log):
        raise InputError(f"{path}: {gaps} values are missing in {len(log)} rows. Fetch the file again.")
    return log


def _unreadable(path: Path, columns: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0]
    return InputError(f"{path} could not be read as {columns}: {reason}. Fetch the file again.")
