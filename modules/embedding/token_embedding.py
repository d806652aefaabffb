"""The token table."""

import torch
from torch import Tensor, nn

import ops
from modules.tokenizer.vocabulary import CodeVocabulary


class TokenEmbedding(nn.Module):
    """One table over the code vocabulary, read by encoder and decoder.

    Args:
        vocabulary: numbers the rows.
        d_model: width.
    """

    _zero: Tensor

    def __init__(self, vocabulary: CodeVocabulary, d_model: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.randn(vocabulary.num_tokens, d_model))
        # Buffers move with the module: numbers made at every call would be copied to the device every time.
        self.register_buffer("_zero", torch.zeros(1, dtype=torch.int64), persistent=False)
        for language in vocabulary.languages:
            first_tokens = torch.tensor([vocabulary.bos, *vocabulary.level_offsets(language)])
            self.register_buffer(f"_first_tokens_{language}", first_tokens, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., D]."""
        rows = ops.semantic_id_embedding(tokens.reshape(-1, 1), self.weight, self._zero)
        return rows.view(*tokens.shape, self.weight.shape[1])

    def codes(self, codes: Tensor, language: str, first_level: int = 0) -> Tensor:
        """[B, L] codes of consecutive levels -> [B, L, D]; codes below 0 read as zeros."""
        level_offsets = self._first_tokens(language)[first_level + 1 : first_level + 1 + codes.shape[1]]
        return ops.semantic_id_embedding(codes, self.weight, level_offsets)

    def decoder_inputs(self, codes: Tensor, language: str) -> Tensor:
        """[B, L] codes of whole items -> [B, L, D]: BOS, then every code but the last; codes below 0 read as zeros."""
        bos = self._zero.expand(len(codes), 1)
        level_offsets = self._first_tokens(language)[: codes.shape[1]]
        return ops.semantic_id_embedding(torch.cat([bos, codes[:, :-1]], dim=1), self.weight, level_offsets)

    def _first_tokens(self, language: str) -> Tensor:
        """[1 + L] int64: BOS, then the token of code 0 of every level."""
        return getattr(self, f"_first_tokens_{language}")
