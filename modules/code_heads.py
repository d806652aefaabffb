"""Output heads: what the decoder's states say of the codes of each level, and the losses of the right ones."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from data.schemas import NO_TARGET
from modules.transformer.attention import scaled_linear

_MAX_CODES_IN_ONE_PRODUCT = 8192
"""Codes of all levels together up to which a GPU computes every level's logits at every position, most in vain: that is
cheaper than a handful of small products, whose launches take longer than their arithmetic."""


class CodeHeads(nn.ModuleDict):
    """A linear head for every level of every language, over that level's codes.

    Args:
        languages: level sizes by language.
        d_model: width of the states.
    """

    def __init__(self, languages: Mapping[str, Sequence[int]], d_model: int) -> None:
        super().__init__(
            {name: nn.ModuleList(scaled_linear(d_model, size) for size in sizes) for name, sizes in languages.items()}
        )

    def of_level(self, language: str, level: int) -> nn.Linear:
        """The head of one level."""
        return self._of(language)[level]

    def losses(self, hidden: Tensor, codes: Tensor, language: str, label_smoothing: float) -> Tensor:
        """Cross-entropies of codes.

        Args:
            hidden: [B, L, D] states of all levels.
            codes: [B, L] int64; NO_TARGET counts 0.
            language: of the codes.
            label_smoothing: share of the target that is spread over a level's codes.

        Returns:
            [B, L] fp32.
        """
        num_codes = sum(head.out_features for head in self._of(language))
        if hidden.device.type != "cpu" and num_codes <= _MAX_CODES_IN_ONE_PRODUCT:
            return self._in_one_product(hidden, codes, language, label_smoothing)
        return self._level_by_level(hidden, codes, language, label_smoothing)

    def _of(self, language: str) -> list[nn.Linear]:
        return [cast(nn.Linear, head) for head in cast(nn.ModuleList, self[language])]

    def _level_by_level(self, hidden: Tensor, codes: Tensor, language: str, label_smoothing: float) -> Tensor:
        losses = [
            ops.cross_entropy_small_vocab(
                head(level_hidden),
                level_codes.contiguous(),
                ignore_index=NO_TARGET,
                label_smoothing=label_smoothing,
            )
            for head, level_hidden, level_codes in zip(
                self._of(language), hidden.unbind(1), codes.unbind(1), strict=True
            )
        ]
        return torch.stack(losses, dim=1)

    def _in_one_product(self, hidden: Tensor, codes: Tensor, language: str, label_smoothing: float) -> Tensor:
        """As `_level_by_level`, with the logits of all levels at every position."""
        heads = self._of(language)
        logits = F.linear(hidden.flatten(0, 1), torch.cat([head.weight for head in heads]))
        bounds = accumulate((head.out_features for head in heads), initial=0)
        losses = ops.cross_entropy_small_vocab(
            logits,
            codes.flatten(),
            ignore_index=NO_TARGET,
            label_smoothing=label_smoothing,
            level_slice=tuple(pairwise(bounds)),
        )
        return losses.view(codes.shape)
