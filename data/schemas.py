"""The shapes that data takes on its way from prepared tables to a model: the ground floor of every room.

Only torch, numpy and safetensors are imported here.
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

NO_ITEM = -1
"""Item id that fills the end of a ranked list shorter than k."""

NO_TARGET = -1
"""Target item, and each of its codes, of a row that only fills a batch up to its capacity: nothing to learn there."""

SPLIT_ROLES = ("train", "valid", "test")


class InputError(ValueError):
    """A mistake in what the user gave (file, config, key); scripts print it as one line and exit with code 2."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        InputError: if the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist. Check the path, or build the folder that should hold it again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}). Delete it and build it again, or copy it again."
        ) from error


def user_hashes(user_keys: list[str]) -> np.ndarray:
    """[U] int64: the first 8 bytes of BLAKE2b of each key, the same on every machine and with every version."""
    digests = b"".join(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest() for key in user_keys)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def _pack_strings(strings: list[str]) -> tuple[Tensor, Tensor]:
    encoded = [string.encode("utf-8") for string in strings]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), torch.from_numpy(offsets)


def _unpack_strings(text: Tensor, offsets: Tensor) -> list[str]:
    raw, bounds = text.numpy().tobytes(), offsets.tolist()
    return [raw[begin:end].decode("utf-8") for begin, end in pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What a person wants to know of every item; position i describes item_id i.

    Attributes:
        item_keys: the source's own ids, distinct.
        titles: readable names, "" where the source has none.
        categories: most specific category path joined by " > ", "" where unknown.
        cold: [N] bool, true where no training range of the split contains the item; None when not known.
    """

    item_keys: list[str]
    titles: list[str]
    categories: list[str]
    cold: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {"item_keys": len(self.item_keys), "titles": len(self.titles), "categories": len(self.categories)}
        if self.cold is not None:
            lengths["cold"] = len(self.cold)
        if len(set(lengths.values())) > 1:
            raise InputError(f"Catalogue expected columns of one length, got {lengths}.")

    def __len__(self) -> int:
        return len(self.item_keys)

    def display_name(self, item_id: int) -> str:
        """Title of an item, or its key where it has no title."""
        return self.titles[item_id] or self.item_keys[item_id]

    def save(self, path: Path) -> None:
        """Write as one safetensors file: UTF-8 bytes and int64 offsets per column."""
        tensors: dict[str, Tensor] = {}
        for name in ("item_keys", "titles", "categories"):
            tensors[f"{name}.bytes"], tensors[f"{name}.offsets"] = _pack_strings(getattr(self, name))
        if self.cold is not None:
            tensors["cold"] = self.cold.to(torch.bool)
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Read what `save` wrote; InputError when the file is missing, truncated or of another kind."""
        tensors = read_safetensors(path)
        try:
            columns = {
                name: _unpack_strings(tensors[f"{name}.bytes"], tensors[f"{name}.offsets"])
                for name in ("item_keys", "titles", "categories")
            }
        except KeyError as error:
            raise InputError(f"{path} is not a catalogue: it lacks {error}.") from error
        return cls(**columns, cold=tensors.get("cold"))


@dataclass(frozen=True, eq=False)
class Histories:
    """Every user's interactions in time order, packed.

    Attributes:
        offsets: [U+1] int32 row boundaries.
        item_ids: [T] int32.
        timestamps: [T] int64 seconds, or the order index where the source has no time.
        user_hashes: [U] int64 stable hashes of the user keys.
    """

    offsets: Tensor
    item_ids: Tensor
    timestamps: Tensor
    user_hashes: Tensor

    @property
    def num_users(self) -> int:
        """U, the number of history rows."""
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Ranges:
    """Parts of histories: example e is items [begins[e], ends[e]) of history row rows[e], with item ends[e] as target.

    In a training role the items begins..ends (both included) are what training may see; an example strategy
    chooses targets among them. Positions count from the start of the user's history.

    Attributes:
        rows, begins, ends: [E] int32.
    """

    rows: Tensor
    begins: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def visible(self, histories: Histories) -> Tensor:
        """[T] bool over the packed interactions: true for those that items begins..ends of some range cover."""
        starts = histories.offsets.long()[self.rows.long()]
        steps = torch.zeros(len(histories.item_ids) + 1, dtype=torch.int32)
        ones = torch.ones(len(self), dtype=torch.int32)
        steps.index_add_(0, starts + self.begins, ones)
        steps.index_add_(0, starts + self.ends + 1, -ones)
        return steps.cumsum(0)[:-1] > 0

    def interactions(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """Every interaction that some range covers, once, in stored order.

        Returns:
            [P] int64 history rows (rising) and [P] int64 item ids.
        """
        visible = self.visible(histories)
        rows = torch.repeat_interleave(histories.offsets.long().diff())
        return rows[visible], histories.item_ids[visible].long()


@dataclass(frozen=True, eq=False)
class Split:
    """A named, stored division of the histories into the roles train, valid and test."""

    name: str
    train: Ranges
    valid: Ranges
    test: Ranges

    def role(self, role: str) -> Ranges:
        """Ranges of one of SPLIT_ROLES."""
        if role not in SPLIT_ROLES:
            raise InputError(f"unknown split role {role!r}; valid roles: {', '.join(SPLIT_ROLES)}.")
        return getattr(self, role)


def _packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[T] int64 of all rows, and their boundaries [B+1] int32."""
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
    offsets[1:] = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
    return torch.tensor([item for row in rows for item in row], dtype=torch.int64), offsets


@dataclass(frozen=True, eq=False)
class SeqBatch:
    """A jagged batch of item histories.

    A batch of fixed capacity (`to_capacity`) ends in a tail: item ids behind offsets[-1] belong to no row, and its last
    rows are empty and have NO_TARGET.

    Attributes:
        item_ids: [T] int64, oldest first within a row; T >= offsets[-1].
        offsets: [B+1] int32 row boundaries.
        max_len: upper bound of the row lengths, a Python int.
        user_hashes: [B] int64; zeros where users are unknown.
        targets: [B] int64 item ids to predict, or NO_TARGET, or None for the whole batch.
    """

    item_ids: Tensor
    offsets: Tensor
    max_len: int
    user_hashes: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> "SeqBatch":
        """The same batch on another device; copies to a GPU do not wait for it."""
        soon = torch.device(device).type == "cuda"
        return replace(
            self,
            item_ids=self.item_ids.to(device, non_blocking=soon),
            offsets=self.offsets.to(device, non_blocking=soon),
            user_hashes=self.user_hashes.to(device, non_blocking=soon),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=soon),
        )

    def to_capacity(self, *, num_rows: int, num_items: int) -> "SeqBatch":
        """The batch filled up to fixed sizes with empty rows without target and item ids 0 that belong to no row.

        Args:
            num_rows: B of the result.
            num_items: T of the result.

        Raises:
            ValueError: if the batch is larger.
        """
        rows, items = num_rows - len(self), num_items - len(self.item_ids)
        if rows < 0 or items < 0:
            raise ValueError(
                f"SeqBatch.to_capacity expected a batch of at most {num_rows} rows and {num_items} items, "
                f"got {len(self)} rows and {len(self.item_ids)} items."
            )
        return replace(
            self,
            item_ids=pad(self.item_ids, (0, items)),
            offsets=torch.cat([self.offsets, self.offsets[-1:].expand(rows)]),
            user_hashes=pad(self.user_hashes, (0, rows)),
            targets=None if self.targets is None else pad(self.targets, (0, rows), value=NO_TARGET),
        )

    @classmethod
    def from_lists(cls, histories: list[list[int]]) -> "SeqBatch":
        """A batch without users and targets from Python lists of item ids; rows may be empty."""
        item_ids, offsets = _packed(histories)
        max_len = max(map(len, histories), default=0)
        return cls(item_ids, offsets, max_len, torch.zeros(len(histories), dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """Which items each row of a batch may get: a set of items per row, and flags for all rows.

    Attributes:
        item_ids: [T] int64 in 0..N-1, the rows' sets, packed; T >= offsets[-1], ids behind it belong to no row.
        offsets: [B+1] int32 row boundaries.
        only: [B] bool; true where a row may get nothing but its set, false where it may get anything but its set.
        allowed: [N] bool, the items that any row may get; None is all.
    """

    item_ids: Tensor
    offsets: Tensor
    only: Tensor
    allowed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_lists(
        cls, item_ids: list[list[int]], only: list[bool] | None = None, allowed: Tensor | None = None
    ) -> "ItemFilter":
        """From Python lists of item ids, one per row; by default each row may get anything but its list."""
        packed, offsets = _packed(item_ids)
        return cls(packed, offsets, torch.tensor(only or [False] * len(item_ids), dtype=torch.bool), allowed)

    @classmethod
    def for_all(cls, allowed: Tensor, num_rows: int) -> "ItemFilter":
        """The same items, `allowed` [N] bool, for every row."""
        device = allowed.device
        return cls(
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.bool, device=device),
            allowed,
        )

    @classmethod
    def unseen(cls, histories: SeqBatch, allowed: Tensor | None = None) -> "ItemFilter":
        """Anything but what a row's history contains."""
        anything_but = torch.zeros(len(histories), dtype=torch.bool, device=histories.item_ids.device)
        return cls(histories.item_ids, histories.offsets, anything_but, allowed)

    def flags(self, num_items: int) -> Tensor:
        """[B, num_items] bool, for rankers that score every item anyway."""
        places = torch.arange(len(self.item_ids), dtype=self.offsets.dtype, device=self.offsets.device)
        rows = torch.bucketize(places, self.offsets[1:], right=True)
        # The tail's items get a row of their own: leaving them out would make a GPU's host wait for their number.
        listed = torch.zeros(len(self) + 1, num_items, dtype=torch.bool, device=self.item_ids.device)
        listed[rows, self.item_ids] = True
        flags = listed[:-1] == self.only[:, None]
        return flags if self.allowed is None else flags & self.allowed

    def to(self, device: torch.device | str) -> "ItemFilter":
        """The same filter on another device; copies to a GPU do not wait for it."""
        soon = torch.device(device).type == "cuda"
        return ItemFilter(
            self.item_ids.to(device, non_blocking=soon),
            self.offsets.to(device, non_blocking=soon),
            self.only.to(device, non_blocking=soon),
            None if self.allowed is None else self.allowed.to(device, non_blocking=soon),
        )

    def part(self, rows: slice) -> "ItemFilter":
        """The filter of some consecutive rows."""
        begin, end, _ = rows.indices(len(self))
        first, last = self.offsets[begin : end + 1 : max(end - begin, 1)].tolist() if end > begin else (0, 0)
        return replace(
            self,
            item_ids=self.item_ids[first:last],
            offsets=self.offsets[begin : end + 1] - first,
            only=self.only[rows],
        )

    def to_capacity(self, *, num_rows: int, num_items: int) -> "ItemFilter":
        """Filled up to fixed sizes: T of `num_items`, and empty rows that may get anything (ValueError if larger)."""
        rows, items = num_rows - len(self), num_items - len(self.item_ids)
        if rows < 0 or items < 0:
            raise ValueError(
                f"ItemFilter.to_capacity expected at most {num_rows} rows and {num_items} items, "
                f"got {len(self)} rows and {len(self.item_ids)} items."
            )
        return replace(
            self,
            item_ids=pad(self.item_ids, (0, items)),
            offsets=torch.cat([self.offsets, self.offsets[-1:].expand(rows)]),
            only=pad(self.only, (0, rows)),
        )


@dataclass(frozen=True, eq=False)
class TokenizedSeqBatch:
    """A jagged batch as the retrieval model reads it.

    Tokens behind offsets[-1], the tail of a batch of fixed capacity, are valid indices but belong to no row.

    Attributes:
        tokens: [T] int64 indices into the model's token table (user token, codes, separators); T >= offsets[-1].
        offsets: [B+1] int32 row boundaries.
        max_len: upper bound of the row lengths, a Python int.
        target_codes: [B, L] int64 codes of the target item per level (not offset by level), NO_TARGET in a row
            without target, which loss and metrics leave out; or None for the whole batch.
        histories: the items that the tokens were written from, for models that read more of an item than its codes.
    """

    tokens: Tensor
    offsets: Tensor
    max_len: int
    target_codes: Tensor | None = None
    histories: SeqBatch | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1
