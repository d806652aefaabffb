"""The retrieval transformer: histories of semantic ids in, the next item's semantic id out, code by code.

Rajput et al. 2023 ("TIGER") on the transformer of Raffel et al. 2020 ("T5"), over packed rows. With item features, it
reads and ranks items by these as well (Yang et al. 2024, "LIGER").
"""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields

import torch
from torch import Tensor, nn

import ops
from data.schemas import NO_TARGET, InputError, SeqBatch, TokenizedSeqBatch
from modules.code_heads import CodeHeads
from modules.dense_head import catalogue_loss, unit_queries
from modules.embedding.item_embedding import ItemEmbedding
from modules.embedding.token_embedding import TokenEmbedding
from modules.item_table import ItemTable
from modules.item_tower import ItemTower
from modules.model_config import RetrievalModelConfig
from modules.transformer.decoder import Decoder, DecoderState
from modules.transformer.encoder import Encoder
from modules.transformer.rows import Rows
from modules.transformer.sizes import StackSizes

__all__ = ["EncoderDecoderRetrievalModel", "RetrievalModelConfig"]


class EncoderDecoderRetrievalModel(nn.Module):
    """T5-style encoder-decoder over packed code tokens, with one output head per level over that level's codes.

    With `config.items`, items are read by their features as well as by their codes; with a weight for it, the encoder
    has a dense head, whose scores are cosines of the state at a row's last token and of the items' projected features.

    Args:
        config: sizes; its first language is the one that is generated.

    Raises:
        InputError: if the config lacks languages, or the width of the item features.
    """

    def __init__(self, config: RetrievalModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = config.vocabulary()
        self.language = next(iter(config.languages))
        self._num_trainings = 0
        sizes = StackSizes(**{size.name: getattr(config, size.name) for size in fields(StackSizes)})
        self.embedding = TokenEmbedding(self.vocabulary, config.d_model)
        self.encoder = Encoder(config.num_encoder_layers, sizes)
        if config.writes_codes:
            self.decoder = Decoder(config.num_decoder_layers, sizes)
            self.heads = CodeHeads(config.languages, config.d_model)
        if config.items is not None:
            self.item_tower = ItemTower(config.items, config.d_model)
            self.item_embedding = ItemEmbedding(
                config.items,
                config.d_model,
                tokens_per_item=self.num_levels + config.separator,
                user_tokens=config.num_user_buckets > 0,
            )

    @property
    def num_levels(self) -> int:
        """Codes that are generated per item."""
        return self.vocabulary.num_levels(self.language)

    def forward(self, batch: TokenizedSeqBatch, items: ItemTable | None = None) -> dict[str, Tensor]:
        """Training loss.

        Args:
            batch: with target_codes [B, L], and for a dense head with targets in its histories; rows with NO_TARGET
                count nowhere.
            items: of the whole catalogue, for a model with `config.items`; the dense head's loss ranks no cold ones.

        Returns:
            "loss", by the config's weights the sum over levels of the mean cross-entropy of the codes, plus the mean
            cross-entropy over the catalogue. Without gradient, "loss_level_{l}" of each level, and where there are both
            parts "loss_sid" and "loss_embedding". All fp32.

        Raises:
            ValueError: if the batch has no targets of the right number of levels, or items are missing.
            InputError: if the features are of another width, or a history is too long for the item positions.
        """
        parts: dict[str, Tensor] = {}
        levels: dict[str, Tensor] = {}
        with self._dropout_seeds(batch.tokens.device):
            read, catalogue = self._projected(batch, items)
            rows = Rows(batch.offsets, batch.max_len)
            encoded = self._encode(batch, rows, read)
            if self.config.writes_codes:
                level_losses = self._mean_level_losses(batch, encoded, rows)
                parts["sid"] = level_losses.sum()
                levels = {f"loss_level_{level}": loss for level, loss in enumerate(level_losses.detach())}
        if self.config.has_dense_head:
            parts["embedding"] = self._dense_loss(batch, unit_queries(encoded, rows), catalogue, items)
        return self._weighted(parts) | levels

    def project_items(self, items: ItemTable) -> Tensor:
        """[N, D] vectors of items, which `start` and `queries` read and whose cosines with queries are scores.

        With gradient, and with dropout in training mode; a learned vector stands for missing features.

        Raises:
            InputError: if the model reads no item features, or those of another width.
        """
        return self._tower()(items.features, items.missing)

    def fit_features_(self, items: ItemTable) -> None:
        """Standardise features from now on by those of the items that are neither cold nor missing.

        Raises:
            InputError: if the model reads no item features, or those of another width, or there are no such items.
        """
        self._tower().fit_(items)

    def weights_key(self) -> Hashable:
        """Differs whenever `project_items` may give something else than at the last call: the key of caches.

        Fused optimizers and replayed CUDA graphs change weights unnoticed by PyTorch, so every call of `train(True)`
        changes the key: call it before training goes on.
        """
        return self._num_trainings, self._tower().state_key()

    def train(self, mode: bool = True) -> "EncoderDecoderRetrievalModel":
        """Training or evaluation mode."""
        self._num_trainings += mode
        return super().train(mode)

    def queries(self, batch: TokenizedSeqBatch, item_vectors: Tensor | None) -> Tensor:
        """The dense head's side of a history: the encoder's state at every row's last token.

        Args:
            batch: B rows.
            item_vectors: [N, D] from `project_items`.

        Returns:
            [B, D] fp32 of unit length, zeros for rows without tokens. A score is the cosine with an item's vector.

        Raises:
            InputError: if the model has no dense head, or a history is too long for the item positions.
            ValueError: if the item vectors are missing.
        """
        if not self.config.has_dense_head:
            raise InputError(
                "the model has no dense head: it was trained with RetrievalModelConfig.embedding_loss_weight = 0. Use "
                "generative retrieval, or train a model with a weight above 0."
            )
        rows = Rows(batch.offsets, batch.max_len)
        return unit_queries(self._encode(batch, rows, self._read(batch, item_vectors)), rows)

    def log_likelihood(self, batch: TokenizedSeqBatch, item_vectors: Tensor | None = None) -> Tensor:
        """[B] fp32 log-probability of the batch's target_codes: the sum over levels, each over the whole level.

        Rows with NO_TARGET have 0. `item_vectors` are those of `start`.
        """
        self._require_decoder()
        rows = Rows(batch.offsets, batch.max_len)
        encoded = self._encode(batch, rows, self._read(batch, item_vectors))
        return -self._level_losses(batch, encoded, rows, label_smoothing=0.0).sum(dim=1)

    @torch.no_grad()
    def start(self, batch: TokenizedSeqBatch, item_vectors: Tensor | None = None) -> DecoderState:
        """Encode every row once, with the cross keys and values of all decoder layers.

        Args:
            batch: B rows.
            item_vectors: [N, D] from `project_items`, for a model with `config.items`.

        Raises:
            InputError: if the model has no decoder, or a history is too long for the item positions.
            ValueError: if the item vectors are missing.
        """
        self._require_decoder()
        rows = Rows(batch.offsets, batch.max_len)
        encoded = self._encode(batch, rows, self._read(batch, item_vectors))
        return self.decoder.start(encoded, rows, num_steps=self.num_levels)

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
        return self.heads.of_level(self.language, level)(self.decoder.step(state, x)).float()

    def _tower(self) -> ItemTower:
        if self.config.items is None:
            raise InputError(
                "the model reads no item features. Train one with RetrievalModelConfig.items = @ItemInputConfig()."
            )
        return self.item_tower

    def _projected(self, batch: TokenizedSeqBatch, items: ItemTable | None) -> tuple[Tensor | None, Tensor | None]:
        """[I, D] vectors of the items of the histories and, where there is a dense head, [N, D] of all items.

        Every item is projected once. Without a dense head, those of a small batch of a large catalogue are projected
        each time that they occur instead.
        """
        if self.config.items is None:
            return None, None
        histories = _histories(batch)
        if items is None:
            raise ValueError(
                "EncoderDecoderRetrievalModel expected items, an ItemTable of the catalogue, got None: the model reads "
                "item features. Call model(batch, items)."
            )
        if not self.config.has_dense_head and len(histories.item_ids) < len(items):
            read = histories.item_ids
            return self.item_tower(items.features[read], items.missing[read]), None
        catalogue = self.project_items(items)
        return self._read(batch, catalogue), catalogue

    def _read(self, batch: TokenizedSeqBatch, item_vectors: Tensor | None) -> Tensor | None:
        """[I, D] vectors of the items of the histories, None for a model that reads codes alone."""
        if self.config.items is None:
            return None
        if item_vectors is None:
            raise ValueError(
                "EncoderDecoderRetrievalModel expected item_vectors [N, D], got None: the model reads item features. "
                "Give it what model.project_items(items) returns."
            )
        return self.item_embedding.rows(item_vectors, _histories(batch).item_ids)

    def _encode(self, batch: TokenizedSeqBatch, rows: Rows, read: Tensor | None) -> Tensor:
        """[T, D] states; `read` are the vectors of the items of the histories, if the model reads them."""
        embedded = self.embedding(batch.tokens)
        if read is not None:
            embedded = self.item_embedding(embedded, _histories(batch), read)
        return self.encoder(embedded, rows)

    def _weighted(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the parts by their weights, and the parts where there are several."""
        weights = {"sid": self.config.sid_loss_weight, "embedding": self.config.embedding_loss_weight}
        terms = [loss if weights[name] == 1.0 else weights[name] * loss for name, loss in parts.items()]
        if len(terms) == 1:
            return {"loss": terms[0]}
        return {"loss": terms[0] + terms[1]} | {f"loss_{name}": loss.detach() for name, loss in parts.items()}

    def _dense_loss(
        self, batch: TokenizedSeqBatch, queries: Tensor, catalogue: Tensor | None, items: ItemTable | None
    ) -> Tensor:
        assert self.config.items is not None
        assert catalogue is not None
        assert items is not None
        temperature = self.config.items.temperature
        return catalogue_loss(queries, catalogue, _histories(batch), items, temperature=temperature)

    def _bos(self, num_rows: int) -> Tensor:
        """[B, 1, D]."""
        return self.embedding.weight[self.vocabulary.bos].expand(num_rows, 1, -1)

    def _dropout_seeds(self, device: torch.device) -> AbstractContextManager[None]:
        """One draw for all dropout in kernels: 4 ops in an encoder layer, 6 in a decoder layer, 2 behind each stack.

        Item features add one in every hidden layer of their projection and one on the encoder's input.
        """
        config = self.config
        if not self.training or device.type == "cpu" or torch.compiler.is_compiling():
            return nullcontext()
        count = 4 * config.num_encoder_layers + 2 if config.dropout > 0.0 else 0
        if config.dropout > 0.0 and config.writes_codes:
            count += 6 * config.num_decoder_layers + 2
        if config.items is not None:
            count += len(config.items.hidden_dims) + 1
        return ops.dropout_seeds(count, device) if count else nullcontext()

    def _mean_level_losses(self, batch: TokenizedSeqBatch, encoded: Tensor, rows: Rows) -> Tensor:
        """[L] mean cross-entropies of the rows that have a target."""
        losses = self._level_losses(batch, encoded, rows, self.config.label_smoothing)
        num_targets = (self._targets(batch)[:, 0] != NO_TARGET).sum().clamp(min=1)
        return losses.sum(dim=0) / num_targets

    def _level_losses(self, batch: TokenizedSeqBatch, encoded: Tensor, rows: Rows, label_smoothing: float) -> Tensor:
        """[B, L] cross-entropies, zeros in rows without target."""
        codes = self._targets(batch)
        hidden = self.decoder(self.embedding.decoder_inputs(codes, self.language), encoded, rows)
        return self.heads.losses(hidden, codes, self.language, label_smoothing)

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

    def _require_decoder(self) -> None:
        if not self.config.writes_codes:
            raise InputError(
                "the model has no decoder: it was trained with RetrievalModelConfig.sid_loss_weight = 0. Use dense "
                "retrieval, or train a model with a weight above 0."
            )


def _histories(batch: TokenizedSeqBatch) -> SeqBatch:
    if batch.histories is None:
        raise ValueError(
            "EncoderDecoderRetrievalModel expected a batch with the histories that its tokens were written from, which "
            "a model with item features reads. Build it by SequenceTokenizer."
        )
    return batch.histories
