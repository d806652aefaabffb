"""What the encoder reads of items that have features."""

import torch
from torch import Tensor, nn

import ops
from data.schemas import InputError, SeqBatch
from modules.item_tower import ItemInputConfig

_POSITION_STD = 0.02


class ItemEmbedding(nn.Module):
    """Adds an item's vector and learned positions to the embeddings of its codes, and norms the sum (LIGER, section 3).

    Level l of the item at position j of a history: Dropout(LayerNorm(E[code] + P(x_j) + position_j + level_l)). A
    separator is one level more; a user token, which is no item's, gets norm and dropout alone.

    Args:
        config: positions and dropout.
        d_model: width.
        tokens_per_item: codes and separator.
        user_tokens: whether every row begins with a user token.
    """

    _zero: Tensor

    def __init__(self, config: ItemInputConfig, d_model: int, *, tokens_per_item: int, user_tokens: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(config.num_positions, d_model) * _POSITION_STD)
        self.levels = nn.Parameter(torch.randn(tokens_per_item, d_model) * _POSITION_STD)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = config.input_dropout
        self.user_tokens = user_tokens
        self.register_buffer("_zero", torch.zeros(1, dtype=torch.int64), persistent=False)

    def rows(self, table: Tensor, numbers: Tensor) -> Tensor:
        """[N, D], [I] int64 -> [I, D], with a gradient that adds up in a fixed order."""
        return ops.semantic_id_embedding(numbers[:, None], table, self._zero).squeeze(1)

    def forward(self, embedded: Tensor, histories: SeqBatch, vectors: Tensor) -> Tensor:
        """Input of the encoder.

        Args:
            embedded: [T, D] rows of the token table for the tokens of the histories.
            histories: B rows of I items, which the tokens were written from.
            vectors: [I, D] of these items.

        Returns:
            [T, D] in the token table's dtype.

        Raises:
            InputError: if a history may have more items than there are positions.
        """
        positions = self.rows(self.positions, self._positions(histories))
        added = ((vectors + positions)[:, None] + self.levels).flatten(0, 1)
        if self.user_tokens:
            users = torch.arange(len(histories) + 1, dtype=torch.int32, device=added.device)
            nothing = added.new_zeros(len(histories), added.shape[1])
            added, _ = ops.jagged_concat((nothing, added), (users, histories.offsets * len(self.levels)))
        normed = self.norm(embedded + added)
        return ops.dropout(normed, dropout_p=self.dropout if self.training else 0.0)

    def _positions(self, histories: SeqBatch) -> Tensor:
        """[I] int64 place of every item within its row; items behind the last row count on from its end."""
        num_positions = len(self.positions)
        if histories.max_len > num_positions:
            raise InputError(
                f"the model has {num_positions} item positions, and a history may have {histories.max_len} items. Set "
                f"ItemInputConfig.num_positions = {histories.max_len}, or max_history to {num_positions}."
            )
        offsets = histories.offsets
        places = torch.arange(len(histories.item_ids), dtype=offsets.dtype, device=offsets.device)
        begins = offsets[torch.bucketize(places, offsets[1:], right=True)]
        return (places - begins).clamp(max=num_positions - 1).long()
