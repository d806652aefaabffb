"""Token embeddings of code tuples."""

import torch
import torch.nn.functional as F
from torch import Tensor


def semantic_id_embedding(
    codes: Tensor, table: Tensor, level_offsets: Tensor, positions: Tensor | None, deterministic: bool
) -> Tensor:
    """See `ops.semantic_id_embedding`; the gradient's order is PyTorch's, whatever `deterministic` says."""
    known = codes >= 0
    rows = F.embedding(torch.where(known, codes + level_offsets, 0), table)
    if positions is not None:
        rows = (rows + positions).to(table.dtype)
    return torch.where(known[..., None], rows, 0.0)
