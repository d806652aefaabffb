"""Item histories to the retrieval model's tokens."""

import torch
from torch import Tensor, nn

from data.schemas import InputError, SeqBatch, TokenizedSeqBatch
from modules.tokenizer.vocabulary import CodeVocabulary


class SequenceTokenizer(nn.Module):
    """Writes every history as [user token] then, per item, its codes [and a separator], without a loop over rows.

    Args:
        semantic_ids: [N, L] int64 codes of the catalogue, the dedup code included.
        vocabulary: decides on user token and separator.
        language: the language of the codes.

    Raises:
        InputError: if the codes do not fit the language's levels.
    """

    semantic_ids: Tensor
    item_tokens: Tensor

    def __init__(self, semantic_ids: Tensor, vocabulary: CodeVocabulary, *, language: str = "text") -> None:
        super().__init__()
        _check_semantic_ids(semantic_ids, vocabulary, language)
        self.vocabulary = vocabulary
        semantic_ids = semantic_ids.long()
        item_tokens = semantic_ids + torch.tensor(vocabulary.level_offsets(language), device=semantic_ids.device)
        if vocabulary.separator_token is not None:
            separators = torch.full_like(item_tokens[:, :1], vocabulary.separator_token)
            item_tokens = torch.cat([item_tokens, separators], dim=1)
        self.register_buffer("semantic_ids", semantic_ids, persistent=False)
        self.register_buffer("item_tokens", item_tokens, persistent=False)

    def forward(self, batch: SeqBatch) -> TokenizedSeqBatch:
        """Tokens of a batch, on the batch's device; rows may be empty.

        Returns:
            tokens with boundaries, and target_codes [B, L] where the batch has targets.
        """
        item_tokens = self.item_tokens.to(batch.item_ids.device)
        tokens_per_item = item_tokens.shape[1]
        tokens = item_tokens[batch.item_ids]
        if self.vocabulary.num_user_buckets == 0:
            packed, offsets, tokens_per_user = tokens.flatten(), batch.offsets * tokens_per_item, 0
        else:
            packed, offsets = self._with_user_tokens(tokens, batch)
            tokens_per_user = 1
        targets = batch.targets
        return TokenizedSeqBatch(
            tokens=packed,
            offsets=offsets,
            max_len=batch.max_len * tokens_per_item + tokens_per_user,
            target_codes=None if targets is None else self.semantic_ids.to(targets.device)[targets],
        )

    def _with_user_tokens(self, tokens: Tensor, batch: SeqBatch) -> tuple[Tensor, Tensor]:
        """[T, tokens per item] -> packed tokens with one user token before each row, and their offsets."""
        num_items, tokens_per_item = tokens.shape
        rows = torch.arange(len(batch), device=tokens.device)
        row_of_item = torch.repeat_interleave(rows, batch.offsets.diff(), output_size=num_items)
        offsets = batch.offsets * tokens_per_item
        offsets = offsets + torch.arange(len(offsets), dtype=torch.int32, device=offsets.device)
        packed = tokens.new_empty(num_items * tokens_per_item + len(batch))
        packed[offsets[:-1].long()] = self.vocabulary.user_tokens(batch.user_hashes)
        items = torch.arange(num_items, device=tokens.device)
        first = items * tokens_per_item + row_of_item + 1
        packed[first[:, None] + torch.arange(tokens_per_item, device=tokens.device)] = tokens
        return packed, offsets


def _check_semantic_ids(semantic_ids: Tensor, vocabulary: CodeVocabulary, language: str) -> None:
    sizes = [vocabulary.size(language, level) for level in range(vocabulary.num_levels(language))]
    if semantic_ids.dim() != 2 or semantic_ids.shape[1] != len(sizes):
        raise InputError(
            f"SequenceTokenizer expected semantic ids [N, {len(sizes)}] in the language {language!r}, "
            f"got {list(semantic_ids.shape)}. Give the vocabulary the tokenizer's level_sizes."
        )
    for level, size in enumerate(sizes):
        codes = semantic_ids[:, level]
        if len(codes) and (int(codes.min()) < 0 or int(codes.max()) >= size):
            raise InputError(
                f"SequenceTokenizer expected codes 0..{size - 1} in level {level} of {language!r}, "
                f"got {int(codes.min())}..{int(codes.max())}. Give the vocabulary the tokenizer's level_sizes."
            )
