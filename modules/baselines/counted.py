"""What the baselines that are counted, not trained, have in common: modules whose buffers are counts."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from data.schemas import NO_ITEM, Histories, InputError, ItemFilter, Ranges, SeqBatch
from modules.config_names import check_names
from modules.top_items import top_items

_MAX_CELLS = 1 << 25
"""Numbers that ranking holds at a time: fewer histories are ranked at once where each needs more of them."""


@dataclass(frozen=True, kw_only=True)
class CountedConfig:
    """What the configs of counted baselines share.

    Attributes:
        filled: fields that configs leave out: sizes, which `CountedRanker.fit` sets, and the seed of a run.
        num_items: N, size of the catalogue.
    """

    filled: ClassVar[tuple[str, ...]] = ("num_items",)
    num_items: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A config from what `to_dict` gave; InputError on unknown names and on values out of range."""
        check_names(cls, values)
        return cls(**values)


class CountedRanker(nn.Module):
    """A ranker that counts a split's training ranges: neither validation nor test targets enter.

    It ranks by itself, where its buffers lie, and gives the same lists on every device.

    Attributes:
        name: in metrics.
        config: settings, and the sizes of the buffers, so that a module can be built into which saved ones fit.
        max_history: items that are read of a history, the last ones.
        batch_size: histories that are ranked at once, at most.
    """

    name: ClassVar[str]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.max_history = 20
        self.batch_size = 256

    @classmethod
    def fit(cls, histories: Histories, ranges: Ranges, num_items: int, config: Any = ...) -> Self:
        """Count what the training ranges show.

        Args:
            histories: all interactions.
            ranges: the training role of a split.
            num_items: size of the catalogue.
            config: settings; sizes in it are replaced.
        """
        raise NotImplementedError

    def with_settings(self, *, max_history: int | None = None, batch_size: int | None = None) -> Self:
        """This ranker after a change of how it ranks; None leaves a setting as it is.

        Raises:
            InputError: if a number is below 1.
        """
        for name, value in {"max_history": max_history, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise InputError(f"{type(self).__name__} expected {name} of at least 1, got {value}.")
        self.max_history = max_history or self.max_history
        self.batch_size = batch_size or self.batch_size
        return self

    @torch.no_grad()
    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """See `Ranker.rank`; results lie where the histories lie."""
        home = histories.item_ids.device
        device = next(self.buffers(), histories.item_ids).device
        recent = items_by_age(histories, self.max_history).to(device)
        users = histories.user_hashes.to(device)
        allowed = None if allowed is None else allowed.to(device)
        item_ids = torch.full((len(histories), k), NO_ITEM, device=device)
        scores = torch.full((len(histories), k), -torch.inf, device=device)
        at_once = max(1, min(self.batch_size, _MAX_CELLS // max(self._cells_per_row(recent.shape[1]), 1)))
        for begin in range(0, len(histories), at_once):
            rows = slice(begin, begin + at_once)
            flags = None if allowed is None else allowed.part(rows).flags(self.config.num_items)
            item_ids[rows], scores[rows] = self._rank(recent[rows], users[rows], k, flags)
        return item_ids.to(home), scores.to(home)

    def _rank(self, recent: Tensor, users: Tensor, k: int, flags: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k best items of some rows.

        Args:
            recent: [B, H] int64 item ids, the last item first, padded with NO_ITEM.
            users: [B] int64 hashes, 0 where unknown.
            k: length of the lists.
            flags: [B, N] bool, the items that each row may get; None is all.
        """
        return top_items(self._scores(recent, users), k, flags, ranker=self.name)

    def _scores(self, recent: Tensor, users: Tensor) -> Tensor:
        """[B, N] float32, -inf for items that are not to be listed; what a ranker defines that scores every item."""
        raise NotImplementedError

    def _cells_per_row(self, length: int) -> int:
        """The most numbers that ranking holds at a time for one row with `length` items."""
        return self.config.num_items


def items_by_age(histories: SeqBatch, max_history: int) -> Tensor:
    """[B, H] int64 item ids of each row, the last item first, padded with NO_ITEM; H is at most `max_history`."""
    ages = torch.arange(min(histories.max_len, max_history), device=histories.item_ids.device)
    places = histories.offsets[1:, None].long() - 1 - ages
    there = places >= histories.offsets[:-1, None]
    return histories.item_ids[places.clamp(min=0)].masked_fill(~there, NO_ITEM)


def last_per_row(rows: Tensor, item_ids: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The last `limit` items of each row, of [P] rising row numbers and their items."""
    _, members = torch.unique_consecutive(rows, return_counts=True)
    ends = torch.repeat_interleave(members.cumsum(0), members)
    kept = ends - torch.arange(len(rows)) <= limit
    return rows[kept], item_ids[kept]


def require(config: CountedConfig, **conditions: bool) -> None:
    """InputError with the values of those fields whose condition does not hold."""
    wrong = [f"{name} = {getattr(config, name)}" for name, holds in conditions.items() if not holds]
    if wrong:
        raise InputError(f"{type(config).__name__}: {', '.join(wrong)} is out of range; see what its fields may be.")
