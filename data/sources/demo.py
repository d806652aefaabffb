"""The demo dataset: a made-up shop, generated from a seed without a network, and the oracle that knows its law."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.schemas import NO_ITEM, Catalogue, InputError, ItemFilter, SeqBatch, user_hashes
from data.sources.base import RawFile, Source, SourceTables
from data.sources.demo_world import MAX_PURCHASES, DemoWorld

if TYPE_CHECKING:
    import polars as pl


class DemoSource(Source):
    """About 1,000 items and 3,000 customers; see `data/sources/demo_world.py` for how they choose.

    Args:
        seed: decides everything.

    Raises:
        InputError: if the seed is negative.
    """

    name = "demo"
    text_template = ("{title}.", "Category: {category}.")  # the title names the brand
    already_filtered: ClassVar[bool] = True
    origin = "It is generated."

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"DatasetConfig.seed must be 0 or more, got {seed}.")
        self.seed = seed

    def raw_files(self) -> list[RawFile]:
        """None: the data is generated."""
        return []

    def settings(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def read(self, raw_dir: Path) -> SourceTables:
        """The shop's catalogue in no particular order, and its log of purchases in time order."""
        world = DemoWorld(self.seed)
        return SourceTables(items=_item_table(world, self.seed), interactions=_purchase_table(world))


def _item_table(world: DemoWorld, seed: int) -> pl.DataFrame:
    import polars as pl

    columns = {
        "item_key": world.items.keys,
        "title": world.items.titles,
        "category": world.items.categories,
        "brand": world.items.brand_names,
        "price": world.items.prices,
    }
    return pl.DataFrame(columns)[np.random.default_rng(seed).permutation(len(world.items))]


def _purchase_table(world: DemoWorld) -> pl.DataFrame:
    import polars as pl

    users, steps = np.nonzero(world.purchases >= 0)
    columns = {
        "user_key": pl.Series(world.customers.keys).gather(users),
        "item_key": pl.Series(world.items.keys).gather(world.purchases[users, steps]),
        "timestamp": world.customers.times[users, steps],
    }
    return pl.DataFrame(columns).sort("timestamp", maintain_order=True)


class OracleRanker:
    """Ranks by the true probability of the next purchase: the best that any recommender can do on the demo.

    It knows the customers' tastes, all that they bought before, and when the next purchase happens; not what it is.

    Args:
        world: the shop that the dataset was generated from.
        catalogue: of the prepared dataset.

    Raises:
        InputError: if the catalogue is of another dataset or seed.
    """

    name = "oracle"

    def __init__(self, world: DemoWorld, catalogue: Catalogue) -> None:
        self._world = world
        positions = {key: position for position, key in enumerate(world.items.keys)}
        unknown = [key for key in catalogue.item_keys if key not in positions]
        if unknown:
            raise InputError(
                f"the catalogue is not of this demo: its item {unknown[0]!r} is unknown. "
                "Use the seed that the dataset was prepared with."
            )
        self._world_items = np.array([positions[key] for key in catalogue.item_keys])
        self._user_rows = {user_hash: row for row, user_hash in enumerate(user_hashes(world.customers.keys).tolist())}

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """The k most probable next items, by log-probability; equal ones by item id.

        Args:
            histories: of demo customers, known by user_hashes; cutting their beginning changes nothing.
            k: length of the lists.
            allowed: items that may be listed.

        Returns:
            item_ids [B, k] int64 and scores [B, k] float32, filled up with -1 and -inf.

        Raises:
            InputError: if a user or a history is not of this demo.
        """
        chance = torch.from_numpy(self._chance(histories)).to(histories.item_ids.device)
        if allowed is not None:
            chance = chance * allowed.to(chance.device).flags(chance.shape[1])
        chance, item_ids = chance.sort(dim=1, descending=True, stable=True)
        scores = chance[:, :k].log().float()
        item_ids = item_ids[:, :k].masked_fill(scores == -torch.inf, NO_ITEM)
        padding = (0, max(k - scores.shape[1], 0))
        return (
            torch.nn.functional.pad(item_ids, padding, value=NO_ITEM),
            torch.nn.functional.pad(scores, padding, value=-torch.inf),
        )

    def _chance(self, histories: SeqBatch) -> np.ndarray:
        """[B, N] probabilities in the order of the catalogue."""
        users = self._users(histories)
        num_bought = self._num_bought(users, histories)
        known = np.arange(MAX_PURCHASES) < num_bought[:, None]
        bought = np.where(known, self._world.purchases[users], -1)
        times = self._world.customers.times[users, np.minimum(num_bought, MAX_PURCHASES - 1)]
        return self._world.next_purchase(users, bought, times)[:, self._world_items]

    def _users(self, histories: SeqBatch) -> np.ndarray:
        rows = [self._user_rows.get(user_hash, -1) for user_hash in histories.user_hashes.tolist()]
        if -1 in rows:
            raise InputError(f"{rows.count(-1)} of {len(rows)} users are not customers of this demo.")
        return np.array(rows, dtype=np.int64)

    def _num_bought(self, users: np.ndarray, histories: SeqBatch) -> np.ndarray:
        """How many purchases each history ends after: nobody buys an item twice, so the last item tells."""
        offsets = histories.offsets.cpu().numpy()
        empty = offsets[1:] == offsets[:-1]
        num_bought = np.zeros(len(users), dtype=np.int64)
        last = self._world_items[histories.item_ids.cpu().numpy()[offsets[1:][~empty] - 1]]
        found = self._world.purchases[users[~empty]] == last[:, None]
        if not found.any(axis=1).all():
            raise InputError("the oracle ranks histories of the demo's own customers only.")
        num_bought[~empty] = found.argmax(axis=1) + 1
        return num_bought
