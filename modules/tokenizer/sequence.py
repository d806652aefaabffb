"""Item histories to the retrieval model's tokens."""

import torch
from torch import Tensor, nn

import ops
from data.schemas import NO_TARGET, InputError, SeqBatch, TokenizedSeqBatch
from modules.tokenizer.vocabulary import CodeVocabulary


class SequenceTokenizer(nn.Module):
    """Writes every history as [user token] then, per item, its codes [and a separator], without a loop over rows.

    Its buffers, int32 for the sake of large catalogues, have to be on the device of the batches; then nothing waits for
    that device.

    Args:
        semantic_ids: [N, L] int64 codes of the catalogue, the dedup code included.
        vocabulary: decides on user token and separator.
        language: the language of the codes.

    Raises:
        InputError: if the codes do not fit the language's levels.
    """

    target_codes: Tensor
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
        # Row 0 is that of NO_TARGET (-1), so that an item id behind the last one is out of range, as it has to be.
        target_codes = torch.nn.functional.pad(semantic_ids, (0, 0, 1, 0), value=NO_TARGET)
        self.register_buffer("target_codes", target_codes.int(), persistent=False)
        self.register_buffer("item_tokens", item_tokens.int(), persistent=False)

    def forward(self, batch: SeqBatch) -> TokenizedSeqBatch:
        """Tokens of a batch; rows may be empty, and the batch may be of fixed capacity.

        Returns:
            tokens with boundaries, and target_codes [B, L] where the batch has targets.
        """
        tokens_per_item = self.item_tokens.shape[1]
        tokens, offsets = self.item_tokens[batch.item_ids].flatten().long(), batch.offsets * tokens_per_item
        max_len = batch.max_len * tokens_per_item
        if self.vocabulary.num_user_buckets > 0:
            users = torch.arange(len(batch) + 1, dtype=torch.int32, device=offsets.device)
            parts = self.vocabulary.user_tokens(batch.user_hashes), tokens
            tokens, offsets = ops.jagged_concat(parts, (users, offsets))
            max_len += 1
        return TokenizedSeqBatch(
            tokens=tokens,
            offsets=offsets,
            max_len=max_len,
            target_codes=None if batch.targets is None else self.target_codes[batch.targets + 1].long(),
            histories=batch,
        )


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
