"""Token embeddings of code tuples, without a pass over the result where no code is below 0."""

import torch.nn.functional as F
from torch import Tensor

from ops.reference.semantic_id_embedding import semantic_id_embedding as reference


def semantic_id_embedding(
    codes: Tensor, table: Tensor, level_offsets: Tensor, positions: Tensor | None, deterministic: bool
) -> Tensor:
    """See `ops.semantic_id_embedding`."""
    if positions is None and bool((codes >= 0).all()):
        return F.embedding(codes + level_offsets, table)
    return reference(codes, table, level_offsets, positions, deterministic)
