"""The contract of a data source: where its raw files are, and how to read them into two tables.

A source module imports polars inside its functions, never at the top: a machine without polars must still be able to
name a source in order to find what was prepared from it elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class RawFile:
    """One file that a source reads.

    Attributes:
        name: path below the raw folder.
        url: where it can be fetched; None when a person has to.
        member: path inside the zip archive at `url`; None when `url` is the file itself.
        sha256: of what lies at `url`, where the publisher keeps it unchanged.
        size: bytes of what lies at `url`, likewise.
        optional: the source can be read without it.
        alternatives: other names under which a local copy is accepted, best first.
    """

    name: str
    url: str | None = None
    member: str | None = None
    sha256: str | None = None
    size: int | None = None
    optional: bool = False
    alternatives: tuple[str, ...] = ()

    def find(self, folder: Path) -> Path | None:
        """Local copy below `folder`, under its name or one of its alternatives; None when there is none."""
        paths = (folder / name for name in (self.name, *self.alternatives))
        return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True, eq=False)
class SourceTables:
    """What a source reads from its raw files, before any filtering.

    Attributes:
        items: `item_key` (String, distinct), `title` and `category` (String or null; a category is a path such as
            "Beauty > Makeup > Nails"), and whatever other columns the text template names. Item ids follow its order.
        interactions: `user_key`, `item_key` (String), `timestamp` (Int64: seconds, or an order index), in the order
            of the raw file, which decides between equal timestamps.
        num_malformed: lines of the raw files that were skipped because they could not be read.
    """

    items: pl.DataFrame
    interactions: pl.DataFrame
    num_malformed: int = 0


class Source(ABC):
    """A public dataset, a generator, or a user's own files.

    Attributes:
        name: names the prepared folder: "amazon-beauty", "ml-1m", "demo".
        text_template: sentences over item columns, such as "Brand: {brand}."; a sentence with a null field is left out.
        already_filtered: the publisher applied the k-core, so preparation must not filter again.
        local_folders: sub-folders of the raw folder in which the files may lie as well.
        origin: one sentence on where a person gets the raw files.
        version: raised whenever `read` makes other tables of the same files, or the template changes.
    """

    name: str
    text_template: tuple[str, ...]
    already_filtered: ClassVar[bool] = False
    local_folders: tuple[str, ...] = ()
    origin: str = ""
    version: ClassVar[int] = 1

    @abstractmethod
    def raw_files(self) -> list[RawFile]:
        """Files that `read` needs; empty for a generator."""

    @abstractmethod
    def read(self, raw_dir: Path) -> SourceTables:
        """Both tables, from a folder that holds the raw files.

        Raises:
            InputError: if a file is truncated, malformed or contradicts another.
        """

    def settings(self) -> dict[str, Any]:
        """What besides the raw files decides the tables (a seed, column names), as JSON values.

        Part of the request that a prepared folder is compared with: a change prepares again.
        """
        return {}
