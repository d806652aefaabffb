"""Token embeddings of code tuples."""

import torch.nn.functional as F
from torch import Tensor


def semantic_id_embedding(codes: Tensor, table: Tensor, level_offsets: Tensor) -> Tensor:
    """See `ops.semantic_id_embedding`."""
    return F.embedding(codes + level_offsets, table)
