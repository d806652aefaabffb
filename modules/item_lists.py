"""Item keys that a request allows or denies, turned into the item ids of an `ItemFilter`."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.schemas import InputError, ItemFilter

ItemKeys = Collection[str] | Sequence[Collection[str] | None] | None
"""A collection of item keys for all rows, or one collection or None for each of them, or None."""


class _Split(NamedTuple):
    """Item keys by whom they hold for; one of the two is None, or both."""

    for_all: Collection[str] | None
    per_row: Sequence[Collection[str] | None] | None


class ItemLists:
    """Allow and deny lists of one catalogue.

    A frozenset for all rows is converted, and its unknown keys warned of, once for as long as it is given again.
    """

    def __init__(self, item_ids: Mapping[str, int]) -> None:
        """`item_ids` has every key of the catalogue; it may grow."""
        self._item_ids = item_ids
        self._latest: tuple[Collection[str] | None, Collection[str] | None, Tensor] | None = None

    def item_filter(
        self, excluded: list[list[int]], *, allow: ItemKeys = None, deny: ItemKeys = None
    ) -> ItemFilter | None:
        """What every row may get; unknown keys are skipped with a warning.

        Args:
            excluded: per row the ids of items that it may not get in any case.
            allow: the only items that may be listed; an empty collection allows nothing, None everything.
            deny: items that may not be listed.

        Returns:
            None where every row may get everything.

        Raises:
            InputError: if allow or deny is a string, mixes keys with collections, or has not one collection per row.
        """
        allowed, denied = (
            _split(keys, name, num_rows=len(excluded)) for keys, name in ((allow, "allow"), (deny, "deny"))
        )
        flags = self._flags(allowed.for_all, denied.for_all)
        kept, dropped = self._per_row(allowed.per_row, "allow"), self._per_row(denied.per_row, "deny")
        if flags is None and kept is None and dropped is None and not any(excluded):
            return None
        sets, only = [], []
        for row, ids in enumerate(excluded):
            forbidden = set(ids) if dropped is None else {*ids, *(dropped[row] or ())}
            permitted = None if kept is None else kept[row]
            sets.append(sorted(forbidden if permitted is None else permitted - forbidden))
            only.append(permitted is not None)
        return ItemFilter.from_lists(sets, only, flags)

    def _flags(self, allow: Collection[str] | None, deny: Collection[str] | None) -> Tensor | None:
        """[N] bool, the items that any row may get; None where that is all."""
        if allow is None and deny is None:
            return None
        if self._latest is not None:
            *keys, flags = self._latest
            if keys[0] is allow and keys[1] is deny and len(flags) == len(self._item_ids):
                return flags
        unknown: dict[str, dict[str, None]] = {"allow": {}, "deny": {}}
        flags = torch.full((len(self._item_ids),), allow is None)
        if allow is not None:
            flags[torch.tensor(self._known(allow, unknown["allow"]), dtype=torch.int64)] = True
        if deny is not None:
            flags[torch.tensor(self._known(deny, unknown["deny"]), dtype=torch.int64)] = False
        for name, keys_of in unknown.items():
            self._warn(name, keys_of)
        if all(keys is None or isinstance(keys, frozenset) for keys in (allow, deny)):
            self._latest = (allow, deny, flags)
        return flags

    def _per_row(self, keys: Sequence[Collection[str] | None] | None, name: str) -> list[set[int] | None] | None:
        if keys is None:
            return None
        unknown: dict[str, None] = {}
        sets: dict[int, set[int]] = {}  # a collection that several rows share, such as what is in stock, is read once
        rows = list(keys)
        for row in rows:
            if row is not None and id(row) not in sets:
                sets[id(row)] = set(self._known(row, unknown))
        self._warn(name, unknown)
        return [None if row is None else sets[id(row)] for row in rows]

    def _known(self, keys: Collection[str], unknown: dict[str, None]) -> list[int]:
        """Ids of the known keys; the others are added to `unknown`."""
        unknown.update((key, None) for key in keys if key not in self._item_ids)
        return [self._item_ids[key] for key in keys if key in self._item_ids]

    def _warn(self, name: str, unknown: dict[str, None]) -> None:
        if unknown:
            warn_of_unknown_keys(list(unknown), num_items=len(self._item_ids), of=f" of {name}", stacklevel=5)


def warn_of_unknown_keys(keys: list[str], *, num_items: int, of: str = "", stacklevel: int) -> None:
    """One warning for all item keys that are skipped because the catalogue lacks them."""
    warnings.warn(
        f"skipped {len(keys)} item keys{of} that the catalogue of {num_items} items does not have: {first_few(keys)}",
        stacklevel=stacklevel + 1,
    )


def first_few(keys: list[str], limit: int = 5) -> str:
    """The first keys of a list, for a message."""
    return ", ".join(map(str, keys[:limit])) + (", ..." if len(keys) > limit else "")


def _split(keys: ItemKeys, name: str, *, num_rows: int) -> _Split:
    if keys is None:
        return _Split(None, None)
    if isinstance(keys, str) or not isinstance(keys, Collection):
        raise InputError(f"{name} expected a collection of item keys, such as a list, got {keys!r}.")
    if isinstance(keys, frozenset) or all(
        isinstance(key, str) for key in keys
    ):  # a large one is not gone through again
        return _Split(keys, None)  # type: ignore[arg-type]
    if not isinstance(keys, Sequence) or any(isinstance(row, str) for row in keys):
        raise InputError(
            f"{name} expected item keys, or a list of one collection of item keys or None per history, got a mixture."
        )
    if len(keys) != num_rows:
        raise InputError(
            f"{name} expected one collection of item keys or None per history, {num_rows}, got {len(keys)}."
        )
    return _Split(None, keys)
