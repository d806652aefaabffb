"""What the training ranges of a split show, and nothing past them."""

import torch
from torch import Tensor

from data.schemas import Histories, Ranges


def training_items(histories: Histories, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Every interaction that training may see, once, in stored order.

    Args:
        histories: all interactions.
        ranges: the training role of a split; the items begins..ends of a row are visible, ranges may overlap.

    Returns:
        [P] int64 history rows (rising) and [P] int64 item ids.
    """
    visible = ranges.visible(histories)
    rows = torch.repeat_interleave(histories.offsets.long().diff())
    return rows[visible], histories.item_ids[visible].long()


def never_repeats(histories: Histories, ranges: Ranges) -> bool:
    """Whether no user's training items hold an item twice.

    In such data (the Amazon 5-core files and MovieLens are such) an item of the history is never the next one, and
    rankers that cannot learn this, ItemKNN above all, look weaker than they are unless evaluation excludes seen items.
    """
    rows, item_ids = training_items(histories, ranges)
    pairs = rows * (int(item_ids.max()) + 1 if len(item_ids) else 1) + item_ids
    return len(torch.unique(pairs)) == len(pairs)
