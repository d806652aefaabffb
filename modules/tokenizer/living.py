"""A catalogue that lives: which items a change names, what they join as, and which versions came before.

Item ids are row numbers: items are only ever appended, and one that is removed keeps its row, id and codes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from data.schemas import Catalogue, InputError
from modules.tokenizer.collisions import joining_dedup_codes

NEW = -1
"""Row of an item that the catalogue does not have yet."""

_OF_THE_ITEMS = frozenset({"format_version", "item_table_hash", "num_items", "num_missing", "file", "file_sha256"})
"""What a description of features says about the items, rather than about what encodes them."""


def checked_keys(item_keys: Sequence[str]) -> list[str]:
    """Item keys as a list of distinct strings, none of them empty (InputError)."""
    keys = _checked_texts("item_keys", item_keys)
    if "" in keys:
        raise InputError(f"item_keys expected keys that are not empty, got an empty one at place {keys.index('')}.")
    repeated = [(key, count) for key, count in Counter(keys).items() if count > 1]
    if repeated:
        key, count = repeated[0]
        raise InputError(f"item_keys expected every key once, got {key!r} {count} times.")
    return keys


def checked_column(name: str, texts: Sequence[str] | None, num_items: int) -> list[str] | None:
    """A column of the catalogue, one text per item, or None where it is not given (InputError)."""
    if texts is None:
        return None
    column = _checked_texts(name, texts)
    if len(column) != num_items:
        raise InputError(f"{name} expected one string per item, {num_items} in all, got {len(column)}.")
    return column


def check_shape(shape: Sequence[int], num_items: int, width: int) -> None:
    """Refuse features of another shape than [num_items, width] (InputError)."""
    if tuple(shape) != (num_items, width):
        raise InputError(
            f"with_items expected features of shape {[num_items, width]}, a row per item and the width that the "
            f"tokenizer was fitted on, got {list(shape)}. Encode the new items as those that it was fitted on."
        )


def rows_of(item_keys: list[str], catalogue: Catalogue) -> Tensor:
    """[M] int64: the row of every key, NEW where the catalogue does not have it."""
    rows: dict[str, int] = {}
    if known := set(item_keys).intersection(catalogue.item_keys):
        flags = map(known.__contains__, catalogue.item_keys)  # all items, but no Python code for each
        rows = {catalogue.item_keys[row]: row for row in compress(range(len(catalogue)), flags)}
    return torch.tensor([rows.get(key, NEW) for key in item_keys], dtype=torch.int64)


def check_can_join(item_keys: list[str], rows: Tensor, available: Tensor | None) -> None:
    """Refuse keys of items that the catalogue has and that are not removed (InputError)."""
    present = [key for key, is_there in zip(item_keys, _present(rows, available), strict=True) if is_there]
    if present:
        raise InputError(
            f"the catalogue already has {_named(present)}. Leave them out, or remove them first: an item that comes "
            "back keeps its codes, whatever its features are by then."
        )


def check_can_leave(item_keys: list[str], rows: Tensor, available: Tensor | None) -> None:
    """Refuse keys of items that the catalogue does not have or that are removed already (InputError)."""
    absent = [key for key, is_there in zip(item_keys, _present(rows, available), strict=True) if not is_there]
    if absent:
        raise InputError(f"the catalogue does not have {_named(absent)}. Leave out unknown and removed items.")


def check_same_encoder(known: Mapping[str, Any], given: Mapping[str, Any] | None) -> None:
    """Refuse features that something else has encoded than the tokenizer's.

    Args:
        known: the tokenizer's description of features: encoder, model, template and other settings.
        given: that of the features; what only one of the two states is not compared. None states nothing.

    Raises:
        InputError: naming the settings that differ.
    """
    if given is None:
        return
    names = (known.keys() & given.keys()) - _OF_THE_ITEMS
    if "model_sha256" in names:
        names -= {"model"}  # the same weights in a folder of another name
    different = sorted(name for name in names if _plain(known[name]) != _plain(given[name]))
    if different:
        raise InputError(
            f"with_items expected features of {_stated(known, different)}, by which the tokenizer was fitted, got "
            f"{_stated(given, different)}. Encode the new items as the tokenizer's manifest describes under 'features'."
        )


def free_dedup_codes(semantic_ids: Tensor, codes: Tensor, item_keys: list[str], level_sizes: tuple[int, ...]) -> Tensor:
    """The next free dedup code for each of some items that join.

    Args:
        semantic_ids: [N, L + 1] int64 of the catalogue, the dedup code last.
        codes: [M, L] int64 of the items that join.
        item_keys: theirs.
        level_sizes: codes per level, the last being what is reserved for the dedup level.

    Returns:
        [M] int64.

    Raises:
        InputError: naming the first item whose tuple is full.
    """
    *codebook_sizes, dedup_size = level_sizes
    dedup = joining_dedup_codes(semantic_ids, codes, codebook_sizes)
    overflowing = (dedup >= dedup_size).nonzero()[:, 0].tolist()
    if overflowing:
        first = overflowing[0]
        raise InputError(
            f"item {item_keys[first]!r} does not fit: the dedup level holds {dedup_size} items per tuple of codes, and "
            f"{tuple(codes[first].tolist())} is full, with removed items keeping their place; "
            f"items that overflow: {len(overflowing)}. Leave them out, or fit a new tokenizer on all items. Identical "
            "features cause this too."
        )
    return dedup


def grown_catalogue(
    catalogue: Catalogue, item_keys: list[str], rows: Tensor, titles: list[str] | None, categories: list[str] | None
) -> Catalogue:
    """A catalogue with items appended, which are cold, and with new texts of items that come back.

    Args:
        catalogue: of N items; where it does not know which are cold, those count as warm.
        item_keys: of M items.
        rows: [M] of those that come back, NEW for the others.
        titles: of the M items; None leaves the titles of those that come back.
        categories: the same.
    """
    joins = (rows == NEW).tolist()
    num_new = sum(joins)
    columns: dict[str, list[str]] = {}
    for name, texts in (("titles", titles), ("categories", categories)):
        columns[name] = [*getattr(catalogue, name), *compress(texts or [""] * len(item_keys), joins)]
        for row, text in zip(rows.tolist(), texts or (), strict=False):
            if row != NEW:
                columns[name][row] = text
    cold = catalogue.cold
    if num_new:
        known = torch.zeros(len(catalogue), dtype=torch.bool) if cold is None else cold
        cold = torch.cat([known, torch.ones(num_new, dtype=torch.bool)])
    return replace(catalogue, item_keys=[*catalogue.item_keys, *compress(item_keys, joins)], cold=cold, **columns)


def with_flags(available: Tensor | None, num_items: int, rows: Tensor, *, value: bool) -> Tensor:
    """[num_items] bool: the flags of the first items, if there are any, true for the others, and a value at `rows`."""
    flags = torch.ones(num_items, dtype=torch.bool)
    if available is not None:
        flags[: len(available)] = available
    flags[rows] = value
    return flags


def checked_flags(available: Tensor | None, num_items: int) -> Tensor | None:
    """Flags [num_items] of the items that are not removed, None where all are.

    Raises:
        InputError: if they are of another shape or dtype, or no item is left.
    """
    if available is None:
        return None
    if available.dtype != torch.bool or available.shape != (num_items,):
        raise InputError(f"available expected [{num_items}] bool, got {list(available.shape)} of {available.dtype}.")
    if not bool(available.any()):
        raise InputError(f"a catalogue needs an item that is not removed, got none among {num_items}. Keep one.")
    return None if bool(available.all()) else available


def _present(rows: Tensor, available: Tensor | None) -> list[bool]:
    """[M] whether a row is that of an item which is not removed."""
    known = rows != NEW
    return known.tolist() if available is None else (known & available[rows]).tolist()  # NEW is the last row, masked


def _checked_texts(name: str, texts: Sequence[str]) -> list[str]:
    """Strings that UTF-8 can hold."""
    if isinstance(texts, str):
        raise InputError(
            f"{name} expected a list of strings, got the string {texts!r}. Write [{texts!r}] for one item."
        )
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{name} expected strings, got {text!r} at place {place}.")
        if not _is_unicode(text):
            raise InputError(f"{name} expected Unicode text, got {text!r} with half a surrogate pair at place {place}.")
    return list(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stated(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={_plain(settings[name])!r}" for name in names)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def _named(item_keys: list[str], limit: int = 5) -> str:
    more = f" and {len(item_keys) - limit} more" if len(item_keys) > limit else ""
    return f"{'item' if len(item_keys) == 1 else 'items'} {', '.join(map(repr, item_keys[:limit]))}{more}"
