"""Cross-entropy over one level's codes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_small_vocab(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """See `ops.cross_entropy_small_vocab`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
