"""Sizes of the retrieval model."""

from dataclasses import asdict, dataclass, field
from typing import Any

from data.schemas import InputError
from modules.config_names import check_names
from modules.item_tower import ItemInputConfig
from modules.tokenizer.vocabulary import CodeVocabulary


@dataclass(frozen=True, kw_only=True)
class RetrievalModelConfig:
    """Sizes of an EncoderDecoderRetrievalModel.

    Attributes:
        languages: level sizes of every code language, dedup level included; the first one is generated. Empty until
            a tokenizer is chosen: a model cannot be built from it.
        num_user_buckets: tokens that users are hashed into; 0 for no user token.
        separator: a token after every item.
        relative_buckets, relative_max_distance: of the position bias.
        items: how item features enter; None reads codes alone.
        sid_loss_weight: of the cross-entropy of the target's codes; 0 builds no decoder.
        embedding_loss_weight: of the cross-entropy over the whole catalogue; 0 builds no dense head, more needs
            `items`. TIGER is 1 and 0 without `items`, LIGER 1 and 1.
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
    items: ItemInputConfig | None = None
    sid_loss_weight: float = 1.0
    embedding_loss_weight: float = 0.0

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
        self._check_weights()
        if languages:
            self.vocabulary()

    @property
    def writes_codes(self) -> bool:
        """Whether the model has a decoder, which generative retrieval needs."""
        return self.sid_loss_weight > 0

    @property
    def has_dense_head(self) -> bool:
        """Whether the model has a dense head, which dense and hybrid retrieval need."""
        return self.embedding_loss_weight > 0

    def _check_weights(self) -> None:
        weights = (self.sid_loss_weight, self.embedding_loss_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise InputError(
                "RetrievalModelConfig expected sid_loss_weight and embedding_loss_weight of at least 0 and not both 0, "
                f"got {weights[0]} and {weights[1]}. TIGER is 1 and 0, LIGER 1 and 1."
            )
        if self.has_dense_head and self.items is None:
            raise InputError(
                "RetrievalModelConfig.embedding_loss_weight above 0 needs item features. "
                "Set RetrievalModelConfig.items = @ItemInputConfig(), or the weight to 0."
            )

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
        check_names(cls, values)
        if "languages" not in values:
            raise InputError("RetrievalModelConfig expected 'languages', got none.")
        items = values.get("items")
        return cls(**{**values, "items": None if items is None else ItemInputConfig.from_dict(items)})
