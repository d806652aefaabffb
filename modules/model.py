"""The retrieval transformer: histories of semantic ids in, the next item's semantic id out, code by code.

Rajput et al. 2023 ("TIGER") on the transformer of Raffel et al. 2020 ("T5"), over packed rows.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from data.schemas import NO_TARGET, InputError, TokenizedSeqBatch
from modules.embedding.token_embedding import TokenEmbedding
from modules.tokenizer.vocabulary import CodeVocabulary
from modules.transformer.attention import scaled_linear
from modules.transformer.decoder import Decoder, DecoderState
from modules.transformer.encoder import Encoder
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes

_MAX_CODES_IN_ONE_PRODUCT = 8192
"""Codes of all levels together up to which a GPU computes every level's logits at every position, most in vain: that is
cheaper than a handful of small products, whose launches take longer than their arithmetic."""


@dataclass(frozen=True, kw_only=True)
class RetrievalModelConfig:
    """Sizes of an EncoderDecoderRetrievalModel.

    Attributes:
        languages: level sizes of every code language, dedup level included; the first one is generated. Empty until
            a tokenizer is chosen: a model cannot be built from it.
        num_user_buckets: tokens that users are hashed into; 0 for no user token.
        separator: a token after every item.
        relative_buckets, relative_max_distance: of the position bias.
    """

    languages: dict[str, tuple[int, ...]] = field(default_factory=dict)
    d_model: int = 128
    num_heads: int = 6
    head_dim: int = 64
    d_ff: int = 1024
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    dropout: float = 0.1
    num_user_buckets: int = 2000
    separator: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        languages = {name: tuple(sizes) for name, sizes in self.languages.items()}
        object.__setattr__(self, "languages", languages)
        for name in ("d_model", "num_heads", "head_dim", "d_ff", "num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"RetrievalModelConfig expected {name} of at least 1, got {getattr(self, name)}.")
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"RetrievalModelConfig expected {name} in [0, 1), got {getattr(self, name)}.")
        if self.relative_buckets < 4 or self.relative_buckets % 4 != 0:
            raise InputError(
                f"RetrievalModelConfig expected relative_buckets as a multiple of 4, got {self.relative_buckets}."
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise InputError(
                f"RetrievalModelConfig expected relative_max_distance above relative_buckets / 2 "
                f"({self.relative_buckets // 2}), got {self.relative_max_distance}."
            )
        if languages:
            self.vocabulary()

    def vocabulary(self) -> CodeVocabulary:
        """The numbering of the model's tokens."""
        return CodeVocabulary(self.languages, num_user_buckets=self.num_user_buckets, separator=self.separator)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; `from_dict` reads them."""
        return asdict(self) | {"languages": {name: list(sizes) for name, sizes in self.languages.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RetrievalModelConfig":
        """A config from what `to_dict` gave.

        Raises:
            InputError: on unknown names, missing languages or values out of range.
        """
        known = [known_field.name for known_field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(
                f"RetrievalModelConfig does not know {', '.join(unknown)}; valid names: {', '.join(known)}. "
                "The file may come from a newer version of this library."
            )
        if "languages" not in values:
            raise InputError("RetrievalModelConfig expected 'languages', got none.")
        return cls(**values)


class EncoderDecoderRetrievalModel(nn.Module):
    """T5-style encoder-decoder over packed code tokens, with one output head per level over that level's codes.

    Args:
        config: sizes; its first language is the one that is generated.
    """

    def __init__(self, config: RetrievalModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = config.vocabulary()
        self.language = next(iter(config.languages))
        sizes = StackSizes(**{size.name: getattr(config, size.name) for size in fields(StackSizes)})
        self.embedding = TokenEmbedding(self.vocabulary, config.d_model)
        self.encoder = Encoder(config.num_encoder_layers, sizes)
        self.decoder = Decoder(config.num_decoder_layers, sizes)
        self.heads = nn.ModuleDict(
            {
                language: nn.ModuleList(scaled_linear(config.d_model, size) for size in level_sizes)
                for language, level_sizes in config.languages.items()
            }
        )

    @property
    def num_levels(self) -> int:
        """Codes that are generated per item."""
        return self.vocabulary.num_levels(self.language)

    def forward(self, batch: TokenizedSeqBatch) -> dict[str, Tensor]:
        """Training loss.

        Args:
            batch: with target_codes [B, L]; rows with NO_TARGET count nowhere.

        Returns:
            "loss", the sum over levels of the mean cross-entropy, and "loss_level_{l}" without gradient, all fp32.

        Raises:
            ValueError: if the batch has no targets of the right number of levels.
        """
        with self._dropout_seeds(batch.tokens.device):
            losses = self._level_losses(batch, self.config.label_smoothing)
        num_targets = (self._targets(batch)[:, 0] != NO_TARGET).sum().clamp(min=1)
        level_losses = losses.sum(dim=0) / num_targets
        named = {f"loss_level_{level}": loss for level, loss in enumerate(level_losses.detach())}
        return {"loss": level_losses.sum(), **named}

    def log_likelihood(self, batch: TokenizedSeqBatch) -> Tensor:
        """[B] fp32 log-probability of the batch's target_codes: the sum over levels, each over the whole level.

        Rows with NO_TARGET have 0.
        """
        return -self._level_losses(batch, label_smoothing=0.0).sum(dim=1)

    @torch.no_grad()
    def start(self, batch: TokenizedSeqBatch) -> DecoderState:
        """Encode every row once, with the cross keys and values of all decoder layers."""
        rows = Rows(batch.offsets, batch.max_len)
        return self.decoder.start(self._encode(batch, rows), rows, num_steps=self.num_levels)

    @torch.no_grad()
    def step(self, state: DecoderState, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        """Logits of the next level for every beam; `state` advances.

        Args:
            state: from `start`.
            codes: [B, W] int64 codes that the beams took in the level before, or None for the first level.
            parents: [B, W] int64 beams of the step before that they continue, or None for the first level.

        Returns:
            [B, W, K] fp32 logits over the level's codes; W is 1 in the first level.

        Raises:
            ValueError: if all levels are done, or codes and parents do not fit the state.
        """
        level = state.beams.num_steps
        self._check_step(state, codes, parents)
        if codes is None or parents is None:
            x = self._bos(state.num_rows)
            state.beams.advance_(torch.zeros(state.num_rows, 1, dtype=torch.int64, device=x.device))
        else:
            state.beams.advance_(parents)
            x = self.embedding.codes(codes.reshape(-1, 1), self.language, first_level=level - 1)
            x = x.view(*codes.shape, self.config.d_model)
        return self._head(level)(self.decoder.step(state, x)).float()

    def _encode(self, batch: TokenizedSeqBatch, rows: Rows) -> Tensor:
        return self.encoder(self.embedding(batch.tokens), rows)

    def _bos(self, num_rows: int) -> Tensor:
        """[B, 1, D]."""
        return self.embedding.weight[self.vocabulary.bos].expand(num_rows, 1, -1)

    def _head(self, level: int) -> nn.Linear:
        return self.heads[self.language][level]  # type: ignore[index]

    def _dropout_seeds(self, device: torch.device) -> AbstractContextManager[None]:
        """One draw for all dropout in kernels: 4 ops in an encoder layer, 6 in a decoder layer, 2 behind each stack."""
        config = self.config
        if not self.training or config.dropout == 0.0 or device.type == "cpu" or torch.compiler.is_compiling():
            return nullcontext()
        return ops.dropout_seeds(4 * config.num_encoder_layers + 6 * config.num_decoder_layers + 4, device)

    def _level_losses(self, batch: TokenizedSeqBatch, label_smoothing: float) -> Tensor:
        """[B, L] cross-entropies, zeros in rows without target."""
        codes = self._targets(batch)
        rows = Rows(batch.offsets, batch.max_len)
        x = self.embedding.decoder_inputs(codes, self.language)
        hidden = self.decoder(x, self._encode(batch, rows), rows)
        num_codes = sum(self.config.languages[self.language])
        if hidden.device.type != "cpu" and num_codes <= _MAX_CODES_IN_ONE_PRODUCT:
            return self._losses_in_one_product(hidden, codes, label_smoothing)
        return self._losses_level_by_level(hidden, codes, label_smoothing)

    def _losses_level_by_level(self, hidden: Tensor, codes: Tensor, label_smoothing: float) -> Tensor:
        """[B, L, D] hidden states, [B, L] codes -> [B, L]."""
        losses = [
            ops.cross_entropy_small_vocab(
                self._head(level)(level_hidden),
                level_codes.contiguous(),
                ignore_index=NO_TARGET,
                label_smoothing=label_smoothing,
            )
            for level, (level_hidden, level_codes) in enumerate(zip(hidden.unbind(1), codes.unbind(1), strict=True))
        ]
        return torch.stack(losses, dim=1)

    def _losses_in_one_product(self, hidden: Tensor, codes: Tensor, label_smoothing: float) -> Tensor:
        """As `_losses_level_by_level`, with the logits of all levels at every position."""
        weights = [self._head(level).weight for level in range(self.num_levels)]
        logits = F.linear(hidden.flatten(0, 1), torch.cat(weights))
        bounds = accumulate(self.config.languages[self.language], initial=0)
        losses = ops.cross_entropy_small_vocab(
            logits,
            codes.flatten(),
            ignore_index=NO_TARGET,
            label_smoothing=label_smoothing,
            level_slice=tuple(pairwise(bounds)),
        )
        return losses.view(codes.shape)

    def _targets(self, batch: TokenizedSeqBatch) -> Tensor:
        codes = batch.target_codes
        if codes is None or codes.shape != (len(batch), self.num_levels):
            got = "None" if codes is None else list(codes.shape)
            raise ValueError(
                f"EncoderDecoderRetrievalModel expected target_codes [{len(batch)}, {self.num_levels}], got {got}. "
                "Build the batch with targets and a tokenizer of this model's levels."
            )
        return codes

    def _check_step(self, state: DecoderState, codes: Tensor | None, parents: Tensor | None) -> None:
        level = state.beams.num_steps
        if level >= self.num_levels:
            raise ValueError(f"step expected at most {self.num_levels} calls, one per level; all are done.")
        if (codes is None) != (level == 0) or (parents is None) != (level == 0):
            raise ValueError(f"step expected codes and parents in every level but the first, this is level {level}.")
        if codes is None or parents is None:
            return
        if codes.shape != parents.shape or codes.dim() != 2 or len(codes) != state.num_rows:
            raise ValueError(
                f"step expected codes and parents [{state.num_rows}, W], "
                f"got {list(codes.shape)} and {list(parents.shape)}."
            )
