"""Hugging Face's beam search as baseline and oracle: T5 with our weights, with and without a constraint."""

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.catalogues import require_memory
from benchmarks.hf_t5 import build_t5, has_transformers, t5_encoder_inputs
from benchmarks.rungs import UnavailableError
from data.schemas import NO_ITEM, TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel

Prefix = tuple[int, ...]

_IMPOSSIBLE = -1e8
"""Hugging Face's scores of beams that are no continuation of anything lie below it."""


def allowed_tokens(tokens: Tensor) -> dict[Prefix, Tensor]:
    """For every prefix of a row of [N, L] tokens the tokens that continue it, [E] int64 ascending."""
    children: dict[Prefix, set[int]] = defaultdict(set)
    for row in tokens.tolist():
        for level, token in enumerate(row):
            children[tuple(row[:level])].add(token)
    return {prefix: torch.tensor(sorted(found), device=tokens.device) for prefix, found in children.items()}


class LevelSoftmax:
    """Makes of log-probabilities over all tokens those over the level that is to be written, as our heads have them."""

    def __init__(self, model: EncoderDecoderRetrievalModel) -> None:
        vocabulary, language = model.vocabulary, model.language
        begins = vocabulary.level_offsets(language)
        self._levels = [slice(begin, begin + vocabulary.size(language, level)) for level, begin in enumerate(begins)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B * W, 1 + level] tokens so far, [B * W, num_tokens] -> the latter."""
        level = self._levels[input_ids.shape[1] - 1]
        normed = torch.full_like(scores, -torch.inf)
        normed[:, level] = scores[:, level].log_softmax(dim=1)
        return normed


class HfGenerator:
    """T5's `generate` for one batch.

    Args:
        model: whose weights T5 gets.
        batch: padded once; that is not timed.
        semantic_ids: [N, L] of the catalogue.
        attention: "eager" or "sdpa".

    Raises:
        UnavailableError: without the transformers package.
    """

    def __init__(
        self, model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch, semantic_ids: Tensor, attention: str
    ) -> None:
        if not has_transformers():
            raise UnavailableError("transformers is not installed")
        device = batch.tokens.device
        level_offsets = torch.tensor(model.vocabulary.level_offsets(model.language))
        tokens = semantic_ids.cpu() + level_offsets
        self._t5 = build_t5(model, attention).to(device).eval()
        self._level_softmax = LevelSoftmax(model)
        self._inputs = t5_encoder_inputs(batch, model)
        self._num_rows, self._num_levels = len(batch), len(level_offsets)
        self._nothing = torch.tensor([model.vocabulary.bos], device=device)
        self._allowed = {prefix: found.to(device) for prefix, found in allowed_tokens(tokens).items()}
        self._items = {tuple(row): item for item, row in enumerate(tokens.tolist())}

    def generate(self, beam_width: int, *, constrained: bool, **options: Any) -> Any:
        """[B * W, 1 + L] tokens, the rows' beams best first; `options` are those of `generate`.

        Args:
            beam_width: W; 1 is greedy search.
            constrained: by `prefix_allowed_tokens_fn`, which looks prefixes up in a dictionary.
            options: further ones of `generate`.
        """
        self._require_memory(beam_width)
        return self._t5.generate(
            **self._inputs,
            num_beams=beam_width,
            num_return_sequences=beam_width,
            max_new_tokens=self._num_levels,
            do_sample=False,
            use_cache=True,
            prefix_allowed_tokens_fn=self._allowed_tokens if constrained else None,
            **options,
        )

    def lists(self, beam_width: int, normalize: Literal["level", "children", "tokens"]) -> tuple[Tensor, Tensor]:
        """Item ids (NO_ITEM for tokens that are none) and scores, both [B, W], for comparison with ours.

        Args:
            beam_width: W, at least 2.
            normalize: constrained, with our scores over a level or over allowed children; or "tokens", not constrained,
                over all tokens.
        """
        from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

        options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
        if normalize == "level":  # in this order, which the argument of `generate` cannot give
            constraint = PrefixConstrainedLogitsProcessor(self._allowed_tokens, beam_width)
            options["logits_processor"] = LogitsProcessorList([self._level_softmax, constraint])
        elif normalize == "children":
            options["renormalize_logits"] = True
        found = self.generate(beam_width, constrained=normalize == "children", **options)
        scores = found.sequences_scores.view(self._num_rows, beam_width)
        item_ids = self.items(found.sequences).masked_fill(scores < _IMPOSSIBLE, NO_ITEM)
        return item_ids, scores.masked_fill(scores < _IMPOSSIBLE, -torch.inf)

    def items(self, sequences: Tensor) -> Tensor:
        """[B * W, 1 + L] tokens -> [B, W] item ids, NO_ITEM for tokens that are none."""
        found = [self._items.get(tuple(row), NO_ITEM) for row in sequences[:, 1:].tolist()]
        return torch.tensor(found, device=sequences.device).view(self._num_rows, -1)

    def _allowed_tokens(self, row: int, tokens: Tensor) -> Any:
        """What may follow a beam's tokens; a beam that follows no prefix, which only fills up a row, gets a token."""
        return self._allowed.get(tuple(tokens[1:].tolist()), self._nothing)

    def _require_memory(self, beam_width: int) -> None:
        """Every beam has its own keys and values of the history, and reordering copies a layer's.

        Raises:
            UnavailableError: if they do not fit.
        """
        config = self._t5.config
        layers = config.num_decoder_layers
        values = self._inputs["input_ids"].numel() * beam_width * 2 * config.num_heads * config.d_kv
        needed = values * 4 * (layers + 2) / 2**20
        require_memory(needed, f"a beam of {beam_width}", self._inputs["input_ids"].device.type)
