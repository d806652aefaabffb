"""Cross-entropy over a whole catalogue of item vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def catalogue_cross_entropy(
    queries: Tensor, items: Tensor, target: Tensor, scale: float, excluded: Tensor | None, ignore_index: int
) -> Tensor:
    """See `ops.catalogue_cross_entropy`; holds all [R, N] scores at once."""
    scores = queries @ items.t()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    counts = target != ignore_index
    if excluded is not None:
        scores = scores.masked_fill(excluded & counts[:, None], float("-inf"))
    total = F.cross_entropy(scores, target, ignore_index=ignore_index, reduction="sum")
    return total / counts.sum().clamp(min=1)
