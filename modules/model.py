"""The retrieval transformer: histories of semantic ids in, the next item's semantic id out, code by code.

Rajput et al. 2023 ("TIGER") on the transformer of Raffel et al. 2020 ("T5"), over packed rows.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import ops
from data.schemas import InputError, TokenizedSeqBatch
from modules.embedding.token_embedding import TokenEmbedding
from modules.tokenizer.vocabulary import CodeVocabulary
from modules.transformer.attention import scaled_linear
from modules.transformer.decoder import Decoder, DecoderState
from modules.transformer.encoder import Encoder
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes


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
            batch: with target_codes [B, L].

        Returns:
            "loss", the sum over levels of the mean cross-entropy, and "loss_level_{l}" without gradient, all fp32.

        Raises:
            ValueError: if the batch has no targets of the right number of levels.
        """
        level_losses = self._level_losses(batch, self.config.label_smoothing).mean(dim=0)
        named = {f"loss_level_{level}": loss for level, loss in enumerate(level_losses.detach())}
        return {"loss": level_losses.sum(), **named}

    def log_likelihood(self, batch: TokenizedSeqBatch) -> Tensor:
        """[B] fp32 log-probability of the batch's target_codes: the sum over levels, each over the whole level."""
        return -self._level_losses(batch, label_smoothing=0.0).sum(dim=1)

    @torch.no_grad()
    def start(self, batch: TokenizedSeqBatch) -> DecoderState:
        """Encode every row once, with the cross keys and values of all decoder layers."""
        rows = Rows(batch.offsets, batch.max_len)
        return self.decoder.start(self._encode(batch, rows), rows)

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
        level = state.num_steps
        self._check_step(state, codes, parents)
        if codes is None or parents is None:
            state.advance_(torch.zeros(state.num_rows, 1, dtype=torch.int64, device=state.ancestors.device))
            x = self._bos(state.num_rows)
        else:
            state.advance_(parents)
            x = self.embedding.codes(codes.reshape(-1, 1), self.language, first_level=level - 1)
            x = x.view(*codes.shape, self.config.d_model)
        return self._head(level)(self.decoder.step(state, x)).float()

    def _encode(self, batch: TokenizedSeqBatch, rows: Rows) -> Tensor:
        return self.encoder(self.embedding(batch.tokens), rows)

    def _bos(self, num_rows: int) -> Tensor:
        """[B, 1, D]."""
        return self.embedding.weight[self.vocabulary.bos].expand(num_rows, 1, -1)

    def _head(self, level: int) -> nn.Module:
        return self.heads[self.language][level]  # type: ignore[index]

    def _level_losses(self, batch: TokenizedSeqBatch, label_smoothing: float) -> Tensor:
        """[B, L] cross-entropies."""
        codes = self._targets(batch)
        x = torch.cat([self._bos(len(batch)), self.embedding.codes(codes[:, :-1], self.language)], dim=1)
        rows = Rows(batch.offsets, batch.max_len)
        hidden = self.decoder(x, self._encode(batch, rows), rows)
        losses = [
            ops.cross_entropy_small_vocab(
                self._head(level)(hidden[:, level]), codes[:, level].contiguous(), label_smoothing=label_smoothing
            )
            for level in range(self.num_levels)
        ]
        return torch.stack(losses, dim=1)

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
        level = state.num_steps
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
