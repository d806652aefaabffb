"""What is popular: the baseline that knows nothing of the user."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.schemas import NO_ITEM, Histories, Ranges
from modules.baselines.counted import CountedConfig, CountedRanker
from modules.top_items import top_items


@dataclass(frozen=True, kw_only=True)
class PopularityConfig(CountedConfig):
    """Popularity has no settings."""


class PopularityRanker(CountedRanker):
    """The same list for everybody: items by their number of training interactions, ties by lowest item id.

    Attributes:
        counts: [N] int64 training interactions per item.
        order: [N] int64 item ids, most popular first.
    """

    name = "popularity"
    counts: Tensor
    order: Tensor

    def __init__(self, config: PopularityConfig) -> None:
        super().__init__(config)
        for name in ("counts", "order"):
            self.register_buffer(name, torch.zeros(config.num_items, dtype=torch.int64))

    @classmethod
    def fit(
        cls, histories: Histories, ranges: Ranges, num_items: int, config: PopularityConfig = PopularityConfig()
    ) -> "PopularityRanker":
        """See `CountedRanker.fit`."""
        ranker = cls(replace(config, num_items=num_items))
        ranker.counts = torch.bincount(ranges.interactions(histories)[1], minlength=num_items)
        ranker.order = ranker.counts.sort(descending=True, stable=True).indices
        return ranker

    def _rank(self, recent: Tensor, users: Tensor, k: int, flags: Tensor | None) -> tuple[Tensor, Tensor]:
        forbidden = 0 if flags is None else int((~flags).sum(dim=1).max())
        candidates = self.order[: k + forbidden]  # enough that every row finds its k, and far fewer than N
        scores = self.counts[candidates].float().expand(len(recent), -1)
        columns, scores = top_items(scores, k, None if flags is None else flags[:, candidates], ranker=self.name)
        return torch.where(columns == NO_ITEM, NO_ITEM, candidates[columns]), scores
