"""Chance: the baseline that every ranker must beat, and a check of the harness, since its metrics are known."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Histories, InputError, Ranges
from modules.baselines.counted import CountedConfig, CountedRanker

_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))
"""Of the hash function lowbias32 (Wellons 2018), as signed numbers."""


@dataclass(frozen=True, kw_only=True)
class RandomConfig(CountedConfig):
    """Which of the random orders.

    Attributes:
        seed: from 0 to 2^31 - 1; another seed gives other lists.

    Raises:
        InputError: if the seed is out of its range.
    """

    filled = ("num_items", "seed")
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise InputError(f"RandomConfig expected a seed from 0 to {2**31 - 1}, got {self.seed}.")


class RandomRanker(CountedRanker):
    """Every item equally likely at every place.

    An item's score is a hash of the seed, the user, the history and the item: the same user with the same history
    gets the same list, whatever is ranked beside it.
    """

    name = "random"

    def __init__(self, config: RandomConfig) -> None:
        super().__init__(config)

    @classmethod
    def fit(
        cls, histories: Histories, ranges: Ranges, num_items: int, config: RandomConfig = RandomConfig()
    ) -> "RandomRanker":
        """See `CountedRanker.fit`; there is nothing to count."""
        return cls(replace(config, num_items=num_items))

    def _scores(self, recent: Tensor, users: Tensor) -> Tensor:
        states = _mixed(_mixed((users >> 32).int() + self.config.seed) ^ users.int())
        for column in recent.T:
            states = torch.where(column == NO_ITEM, states, _mixed(states ^ _mixed(column.int())))
        items = _mixed(torch.arange(self.config.num_items, dtype=torch.int32, device=recent.device))
        return _shifted(_mixed(states[:, None] ^ items), 8) / float(1 << 24)


def _mixed(states: Tensor) -> Tensor:
    """Hashes of int32 numbers; products wrap."""
    states = (states ^ _shifted(states, 16)) * _FACTORS[0]
    states = (states ^ _shifted(states, 15)) * _FACTORS[1]
    return states ^ _shifted(states, 16)


def _shifted(states: Tensor, places: int) -> Tensor:
    """Shifted to the right, zeros coming in."""
    return (states >> places) & ((1 << (32 - places)) - 1)
