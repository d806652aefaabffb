"""What the training items of a split say about how to evaluate on it."""

import torch

from data.schemas import Histories, Ranges


def never_repeats(histories: Histories, ranges: Ranges) -> bool:
    """Whether no user's training items hold an item twice.

    In such data (the Amazon 5-core files and MovieLens are such) an item of the history is never the next one, and
    rankers that cannot learn this, ItemKNN above all, look weaker than they are unless evaluation excludes seen items.
    """
    rows, item_ids = ranges.interactions(histories)
    pairs = rows * (int(item_ids.max()) + 1 if len(item_ids) else 1) + item_ids
    return len(torch.unique(pairs)) == len(pairs)
