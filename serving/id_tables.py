"""Semantic ids as a table for people and other programs, and the two-column files that name items."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.files import cannot_write, replace_file
from data.schemas import Catalogue, InputError
from modules.tokenizer.tokenizer import SemanticIdTokenizer


def available_rows(tokenizer: SemanticIdTokenizer) -> Tensor:
    """[M] int64 ids of the items that are not removed."""
    if tokenizer.available is None:
        return torch.arange(tokenizer.num_items)
    return tokenizer.available.nonzero()[:, 0]


def write_id_table(path: Path, tokenizer: SemanticIdTokenizer, letters: str) -> None:
    """Write a parquet file with a row per item that is not removed, whole or not at all.

    Its columns: `item_key`, `title` (null where unknown), `code_0`, `code_1`, ... (int32), `dedup_code` (int32, where
    the tokenizer has one) and `semantic_id`, all of them as text, such as "<a_170><b_224><c_3>".

    Args:
        path: of the file; folders are made.
        tokenizer: whose ids.
        letters: of the levels, the dedup level included, see `modules.tokenizer.index_file.letters_of`.

    Raises:
        InputError: if the file cannot be written.
    """
    import polars as pl

    rows = available_rows(tokenizer)
    codes = tokenizer.semantic_ids[rows].int().numpy()
    names = [f"code_{level}" for level in range(tokenizer.num_codebooks)]
    names += ["dedup_code"] * (codes.shape[1] - len(names))
    chosen, catalogue = rows.tolist(), tokenizer.catalogue
    table = pl.DataFrame(
        {
            "item_key": [catalogue.item_keys[row] for row in chosen],
            "title": pl.Series([catalogue.titles[row] or None for row in chosen], dtype=pl.String),
            **{name: codes[:, level] for level, name in enumerate(names)},
        }
    )
    tokens = [pl.format(f"<{letter}_{{}}>", pl.col(name)) for letter, name in zip(letters, names, strict=True)]
    content = io.BytesIO()
    table.with_columns(semantic_id=pl.concat_str(tokens)).write_parquet(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The lines `FIRST<TAB>SECOND` of a UTF-8 file; empty lines are passed over.

    Raises:
        InputError: if the file cannot be read or has no lines, or one has another number of columns or an empty first.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}. Give a text file of lines FIRST<TAB>SECOND.") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        columns = line.rstrip("\r").split("\t")
        if columns == [""]:
            continue
        if len(columns) != 2 or not columns[0]:
            raise InputError(f"{path}:{number} expected FIRST<TAB>SECOND, got {line[:80]!r}.")
        pairs.append((columns[0], columns[1]))
    if not pairs:
        raise InputError(f"{path} has no lines. Give a text file of lines FIRST<TAB>SECOND.")
    return pairs


def by_first(path: Path) -> dict[str, str]:
    """The second columns of `read_pairs` by the first ones (InputError where a first one is there twice)."""
    return _unique(path, read_pairs(path))


def by_second(path: Path) -> dict[str, str]:
    """The first columns of `read_pairs` by the second ones (InputError where a second one is there twice)."""
    return _unique(path, [(second, first) for first, second in read_pairs(path)])


def titled(item_keys: Sequence[str], titles: dict[str, str]) -> Catalogue:
    """A catalogue of items, with the titles of those that have one."""
    return Catalogue(list(item_keys), [titles.get(key, "") for key in item_keys], [""] * len(item_keys))


def _unique(path: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for name, value in pairs:
        if name in table:
            raise InputError(f"{path}: {name!r} is there twice. Keep one of the two lines.")
        table[name] = value
    return table
