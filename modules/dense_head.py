"""The dense side of a retrieval model: a query per history, and its loss among all items (LIGER, Yang et al. 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from data.schemas import NO_TARGET, SeqBatch
from modules.item_table import ItemTable
from modules.transformer.rows import Rows


def unit_queries(encoded: Tensor, rows: Rows) -> Tensor:
    """The encoder's state at every row's last token.

    Args:
        encoded: [T, D].
        rows: its B rows.

    Returns:
        [B, D] fp32 of unit length; zeros for rows without tokens.
    """
    begins, ends = rows.offsets[:-1], rows.offsets[1:]
    return _unit(F.pad(encoded, (0, 0, 1, 0)).index_select(0, torch.where(ends > begins, ends, 0)))


def catalogue_loss(
    queries: Tensor, item_vectors: Tensor, histories: SeqBatch, items: ItemTable, *, temperature: float
) -> Tensor:
    """Mean cross-entropy of the targets among all items that are not cold, scored by cosine / temperature.

    Args:
        queries: [B, D] of unit length.
        item_vectors: [N, D] of any length.
        histories: B rows with targets; rows with NO_TARGET count nowhere.
        items: N, of which those that are cold are out.
        temperature: of the softmax.

    Returns:
        [] fp32, 0 without any target.

    Raises:
        ValueError: if the batch has no targets.
    """
    if histories.targets is None:
        raise ValueError("a dense head expected histories with targets, got none. Build the batch with targets.")
    return ops.catalogue_cross_entropy(
        queries,
        _unit(item_vectors),
        histories.targets,
        scale=1.0 / temperature,
        excluded=items.cold,
        ignore_index=NO_TARGET,
    )


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1)
