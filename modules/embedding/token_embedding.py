"""The token table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from modules.tokenizer.vocabulary import CodeVocabulary


class TokenEmbedding(nn.Module):
    """One table over the code vocabulary, read by encoder and decoder.

    Args:
        vocabulary: numbers the rows.
        d_model: width.
    """

    def __init__(self, vocabulary: CodeVocabulary, d_model: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.randn(vocabulary.num_tokens, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        return F.embedding(tokens, self.weight)

    def codes(self, codes: Tensor, language: str, first_level: int = 0) -> Tensor:
        """[B, L] codes of consecutive levels -> [B, L, D]."""
        offsets = self.vocabulary.level_offsets(language)[first_level : first_level + codes.shape[1]]
        return ops.semantic_id_embedding(codes, self.weight, codes.new_tensor(offsets))
