"""Cross-entropy over one level's codes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_small_vocab(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    level_slices: tuple[tuple[int, int], ...],
) -> Tensor:
    """See `ops.cross_entropy_small_vocab`; row r takes slice r % P of the P level_slices."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = [
        F.cross_entropy(
            logits[number :: len(level_slices), begin:end],
            target[number :: len(level_slices)],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        for number, (begin, end) in enumerate(level_slices)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses, dim=1).flatten()
