"""Every user's rank under every ranker of a board, and what the users are grouped by: all that its numbers stand on.

The safetensors file holds, for E test and V validation users:

targets, rows               [E] int32 target item and history row
popularity                  [E] int32 how often training contains the target; 0 is a cold item
history_length              [E] int32 training interactions of the user
valid/targets, valid/rows   [V] int32
valid/popularity            [V] int32
ranks/{row}/seed_{n}        [E] uint8 place of the target in the list of 20, 0 outside it
valid/ranks/{row}/seed_{n}  [V] uint8

with {row} as in the table: `sasrec`, `liger/hybrid@20`.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files import cannot_write, share
from data.processed import PreparedDataset
from data.schemas import InputError, Ranges, read_safetensors

LONGEST_LIST = 20
ROLES = ("valid", "test")

SeedRanks = dict[int, Tensor]
"""[E] int32 ranks by seed."""


@dataclass(frozen=True, eq=False)
class Users:
    """The evaluated users of one role.

    Attributes:
        rows: [E] int32 history rows.
        targets: [E] int32 items.
        popularity: [E] int32 training interactions of the target.
        history_length: [E] int32 training interactions of the user; None where nothing is grouped by it.
    """

    rows: Tensor
    targets: Tensor
    popularity: Tensor
    history_length: Tensor | None = None

    @classmethod
    def of(cls, dataset: PreparedDataset, split_name: str, role: str) -> "Users":
        """What a prepared data set says about the users of a role."""
        split = dataset.split(split_name)
        histories, ranges = dataset.histories, split.role(role)
        users, items = split.train.interactions(histories)
        counts = torch.bincount(items, minlength=len(dataset.catalogue))
        lengths = torch.bincount(users, minlength=histories.num_users)
        targets = _targets(ranges, histories.offsets, histories.item_ids)
        rows = ranges.rows.long()
        return cls(rows.int(), targets.int(), counts[targets].int(), lengths[rows].int())

    def __len__(self) -> int:
        return len(self.rows)

    def check_lengths(self, path: Path) -> None:
        """InputError naming the file, if not every column has an entry per user."""
        for name in ("rows", "popularity", "history_length"):
            column = getattr(self, name)
            if column is not None and column.shape != self.targets.shape:
                raise InputError(
                    f"{path}: expected {name} of {list(self.targets.shape)} users, got {list(column.shape)}. "
                    "Copy the file again."
                )

    @property
    def cold(self) -> Tensor:
        """[E] bool, users whose target no training range contains."""
        return self.popularity == 0


def _targets(ranges: Ranges, offsets: Tensor, item_ids: Tensor) -> Tensor:
    return item_ids[offsets.long()[ranges.rows.long()] + ranges.ends.long()].long()


@dataclass(frozen=True, eq=False)
class SavedRanks:
    """Ranks of all rows of a board.

    Attributes:
        test: the users of the table.
        valid: the users by which the best baseline is chosen.
        ranks: by role, then by row.
    """

    test: Users
    valid: Users
    ranks: dict[str, dict[str, SeedRanks]] = field(default_factory=lambda: {role: {} for role in ROLES})

    def users(self, role: str) -> Users:
        """Of a role."""
        return self.test if role == "test" else self.valid

    def add(self, role: str, row: str, seed: int, ranks: Tensor) -> None:
        """Put in what a run has saved."""
        self.ranks[role].setdefault(row, {})[seed] = ranks.int()

    def save(self, path: Path) -> None:
        """Write the file; InputError where that cannot be."""
        tensors: dict[str, Tensor] = {}
        for role in ROLES:
            prefix, users = _prefix(role), self.users(role)
            tensors |= {f"{prefix}{name}": getattr(users, name) for name in ("rows", "targets", "popularity")}
            for row, seeds in self.ranks[role].items():
                for seed, ranks in seeds.items():
                    tensors[f"{prefix}ranks/{row}/seed_{seed}"] = ranks.to(torch.uint8)
        assert self.test.history_length is not None
        tensors["history_length"] = self.test.history_length
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.part")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            share(partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from error

    @classmethod
    def load(cls, path: Path) -> "SavedRanks":
        """Read what `save` wrote; InputError when the file is missing, truncated or of another kind."""
        tensors = read_safetensors(path)
        try:
            valid, test = (
                Users(*(tensors[f"{_prefix(role)}{name}"] for name in ("rows", "targets", "popularity")))
                for role in ROLES
            )
            saved = cls(Users(test.rows, test.targets, test.popularity, tensors["history_length"]), valid)
        except KeyError as error:
            raise InputError(f"{path} holds no ranks of a leaderboard: it lacks {error}. Copy it again.") from error
        for role in ROLES:
            saved.users(role).check_lengths(path)
        found: dict[str, list[tuple[str, int, Tensor]]] = defaultdict(list)
        for name, tensor in tensors.items():
            role = "valid" if name.startswith(_prefix("valid")) else "test"
            kind, _, rest = name.removeprefix(_prefix(role)).partition("/")
            if kind == "ranks":
                row, _, seed = rest.rpartition("/seed_")
                num_users = len(saved.users(role))
                if not seed.isdecimal() or tensor.dtype != torch.uint8 or tensor.shape != (num_users,):
                    raise InputError(f"{path}: {name} is not the ranks of {num_users:,} users. Copy the file again.")
                found[role].append((row, int(seed), tensor))
        for role, entries in found.items():
            for row, number, tensor in sorted(entries, key=lambda entry: entry[:2]):
                saved.add(role, row, number, tensor)
        return saved


def _prefix(role: str) -> str:
    return "" if role == "test" else f"{role}/"


def read_run_ranks(folder: Path, role: str, users: Users) -> dict[str, Tensor]:
    """Ranks of every ranker that a run has evaluated, by the ranker's name.

    Raises:
        InputError: if they are of other users or targets than the data set's.
    """
    path = folder / f"ranks_{role}.safetensors"
    tensors = read_safetensors(path)
    for name in ("rows", "targets"):
        if not torch.equal(tensors.get(name, torch.zeros(0)).int(), getattr(users, name)):
            raise InputError(
                f"{path} is about other {name} than this data set and split. Remove {folder} and run the board again."
            )
    return {name.removeprefix("ranks/"): ranks for name, ranks in tensors.items() if name.startswith("ranks/")}
