"""Semantic ids as an index file, the form in which others publish them: {"item": ["<a_1>", "<b_2>", ...], ...}.

The letter is that of the level, the number the code. Ids of texts have lower-case letters, those of another language
upper-case ones.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from string import ascii_lowercase, ascii_uppercase

import torch
from torch import Tensor

from data.files import cannot_write, replace_file
from data.schemas import InputError

MAX_CODE = (1 << 24) - 1
"""Largest code that is read: a level has memory for every code below its largest one."""

_TOKEN = re.compile(r"<([A-Za-z])_([0-9]{1,8})>")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Index:
    """What an index file holds.

    Attributes:
        path: the file.
        item_keys: distinct, in the order of the file.
        codes: [N, L] int64, row i of item_keys[i].
        letters: of the L levels, "abc..." or "ABC...".
    """

    path: Path
    item_keys: list[str]
    codes: Tensor
    letters: str

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The smallest number of codes per level that holds all of them."""
        return tuple((self.codes.amax(0) + 1).tolist())

    def renamed(self, names: Mapping[str, str], source: object) -> "Index":
        """The same ids under other item keys.

        Args:
            names: the new key of every item; those of other items are left aside.
            source: where the names come from, for errors.

        Raises:
            InputError: if an item has no name, or two have the same.
        """
        missing = [key for key in self.item_keys if key not in names]
        if missing:
            raise InputError(f"{source} has no name for {_some(missing)} of {self.path}. Add a line for each item.")
        keys = [names[key] for key in self.item_keys]
        taken: dict[str, str] = {}
        for item, key in zip(self.item_keys, keys, strict=True):
            if taken.setdefault(key, item) != item:
                raise InputError(f"{source} gives {key!r} to two items of {self.path}: {taken[key]!r} and {item!r}.")
        return replace(self, item_keys=keys)

    def aligned(self, item_keys: Sequence[str], source: object) -> "Index":
        """The ids of a catalogue's items in its order; other items are left out, with a line in the log.

        Args:
            item_keys: of the catalogue.
            source: the catalogue, for errors.

        Raises:
            InputError: if the file lacks an item.
        """
        rows = {key: row for row, key in enumerate(self.item_keys)}
        missing = [key for key in item_keys if key not in rows]
        if missing:
            raise InputError(
                f"{self.path} lacks {_some(missing)} of the {len(item_keys):,} of {source}; it has "
                f"{len(rows):,}, such as {self.item_keys[0]!r}. Keys must be written alike in both."
            )
        if len(rows) > len(item_keys):
            _logger.info(
                "%s: %d items that %s does not have are left out", self.path, len(rows) - len(item_keys), source
            )
        wanted = torch.tensor([rows[key] for key in item_keys], dtype=torch.int64)
        return replace(self, item_keys=list(item_keys), codes=self.codes[wanted])


def letters_of(language: str, num_levels: int) -> str:
    """Letters of the levels of a code language: lower case for text, upper case for others.

    Raises:
        InputError: if there are more levels than letters.
    """
    alphabet = ascii_lowercase if language == "text" else ascii_uppercase
    if num_levels > len(alphabet):
        raise InputError(f"an index file has letters for {len(alphabet)} levels, got {num_levels}. Export parquet.")
    return alphabet[:num_levels]


def write_index(path: Path, item_keys: Sequence[str], semantic_ids: Tensor, letters: str) -> None:
    """Write an index file, whole or not at all, one item a line.

    Args:
        path: of the file; folders are made.
        item_keys: of N items, distinct.
        semantic_ids: [N, L] integers of at least 0.
        letters: of the L levels, see `letters_of`.

    Raises:
        InputError: if keys, ids and letters do not fit each other, or the file cannot be written.
    """
    expected = [len(item_keys), len(letters)]
    if list(semantic_ids.shape) != expected or len(set(item_keys)) != len(item_keys) or not item_keys:
        raise InputError(
            f"write_index expected ids of shape {expected} for {len(item_keys)} distinct items, at least one, got "
            f"{list(semantic_ids.shape)} and {len(set(item_keys))} distinct items."
        )
    lines = (
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(_tokens(codes, letters))}"
        for key, codes in zip(item_keys, semantic_ids.tolist(), strict=True)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def read_index(path: Path) -> Index:
    """The ids of an index file, all checked.

    Raises:
        InputError: naming the file, and the item where one is at fault: if the file cannot be read, is not JSON, is
            empty or cut short, an item is there twice, tuples are not equally long, levels are not in the order of the
            alphabet, or a code is not a whole number of at most MAX_CODE.
    """
    entries = _entries(path)
    letters = _letters(path, *entries[0])
    codes = torch.tensor([_codes(path, key, tokens, letters) for key, tokens in entries], dtype=torch.int64)
    return Index(path, [key for key, _ in entries], codes, letters)


class _Pairs(tuple):
    """A JSON object as it stands in the file: a dictionary would hide that a key is there twice."""


def _entries(path: Path) -> list[tuple[str, object]]:
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_Pairs)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a whole JSON file ({error}). Copy it again.") from error
    if not isinstance(content, _Pairs):
        raise InputError(f'{path} expected {{"item": ["<a_1>", ...], ...}}, got a JSON {type(content).__name__}.')
    if not content:
        raise InputError(f"{path} holds no items. Copy it again.")
    seen: set[str] = set()
    for key, _ in content:
        if key in seen:
            raise InputError(f"{path}: item {key!r} is there twice. Keep one of the two.")
        if not key or not _is_text(key):
            raise InputError(f"{path}: item {key!r} expected a key of at least one character that UTF-8 can hold.")
        seen.add(key)
    return list(content)


def _letters(path: Path, key: str, tokens: object) -> str:
    """Letters of the levels, as the first item has them."""
    if not isinstance(tokens, list) or not tokens:
        raise InputError(
            f'{path}: item {key!r} expected a list of codes such as ["<a_1>", "<b_2>"], got {short(tokens)}.'
        )
    match = _TOKEN.fullmatch(tokens[0]) if isinstance(tokens[0], str) else None
    alphabet = ascii_uppercase if match and match[1].isupper() else ascii_lowercase
    if len(tokens) > len(alphabet):
        raise InputError(f"{path}: item {key!r} has {len(tokens)} codes, expected at most {len(alphabet)}.")
    return alphabet[: len(tokens)]


def _codes(path: Path, key: str, tokens: object, letters: str) -> list[int]:
    if not isinstance(tokens, list) or len(tokens) != len(letters):
        got = f"{len(tokens)}" if isinstance(tokens, list) else short(tokens)
        raise InputError(f"{path}: item {key!r} expected {len(letters)} codes like the first item, got {got}.")
    codes = []
    for letter, token in zip(letters, tokens, strict=True):
        match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != letter or int(match[2]) > MAX_CODE:
            raise InputError(
                f"{path}: item {key!r} expected its codes as {_pattern(letters)} with whole numbers of at most "
                f"{MAX_CODE}, got {short(token)} in the place of <{letter}_...>."
            )
        codes.append(int(match[2]))
    return codes


def _tokens(codes: Sequence[int], letters: str) -> list[str]:
    return [f"<{letter}_{code}>" for letter, code in zip(letters, codes, strict=True)]


def _pattern(letters: str) -> str:
    return " ".join(f"<{letter}_...>" for letter in letters)


def _is_text(key: str) -> bool:
    """Whether UTF-8 can hold a string; half a surrogate pair, which JSON can write, is none."""
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _some(keys: Sequence[str]) -> str:
    """How many items, and which are the first."""
    names = ", ".join(map(repr, keys[:3])) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys):,} items ({names})"
