"""The generative ranker: beam search behind the Ranker contract of `evaluation/ranker.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

import ops
from data.schemas import NO_ITEM, InputError, ItemFilter, SeqBatch, TokenizedSeqBatch
from modules.dense.projected_items import ProjectedItems
from modules.generation.beam import Normalize, StepModel, WithItems, raise_if_broken, search_beams
from modules.generation.trie import PrefixTrie
from modules.item_table import ItemTable
from modules.model import EncoderDecoderRetrievalModel
from modules.ranking import check_codes, check_filter, check_settings, evaluation_mode, last_items, parts_of
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer

_BUCKETS = 8
"""Numbers of items that batches of one number of rows are filled up to, for recording."""

_MAX_SHAPES = 64
"""Recordings that are kept: all buckets of eight numbers of rows."""


@dataclass(frozen=True, eq=False)
class Query:
    """What the result of a search depends on.

    Attributes:
        histories: B rows, without targets.
        width: of the beam.
        allowed: of the B rows, or None.
        allowed_before: flags for all rows, from the trie's function of that name, in place of `allowed.allowed`.
    """

    histories: SeqBatch
    width: int
    allowed: ItemFilter | None = None
    allowed_before: Tensor | None = None

    def to_capacity(self, max_rows: int, max_history: int) -> "Query":
        """Filled up to one of a few shapes with empty rows, and with items that belong to no row."""
        histories = self.histories
        num_rows = min(1 << (len(histories) - 1).bit_length(), max_rows)
        bucket = -(-num_rows * max_history // _BUCKETS)
        num_items = max(-(-len(histories.item_ids) // bucket), 1) * bucket
        filled = replace(histories.to_capacity(num_rows=num_rows, num_items=num_items), max_len=max_history)
        allowed = self.allowed
        if allowed is not None:
            size = len(allowed.item_ids)
            room = num_items if size <= num_items else 1 << (size - 1).bit_length()  # seen items need no further shapes
            allowed = allowed.to_capacity(num_rows=num_rows, num_items=room)
        return replace(self, histories=filled, allowed=allowed)


class GenerativeRanker:
    """Ranks items by the model's log-likelihood of their semantic ids, found by exact beam search over real items.

    On a CUDA device a search runs without a look at the device, from the third batch of a shape on as one CUDA graph.
    """

    name = "generative"

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        tokenizer: SemanticIdTokenizer,
        items: ItemTable | ProjectedItems | None = None,
        *,
        beam_width: int = 20,
        max_history: int = 20,
        batch_size: int = 256,
        normalize: Normalize = "level",
        cuda_graphs: bool = True,
    ) -> None:
        """Build the trie of the tokenizer's catalogue.

        Args:
            model: used in evaluation mode on whatever device it lies at the time of a call.
            tokenizer: the one that the model was trained with, or one that has grown from it.
            items: of the tokenizer's catalogue, for a model that reads item features; or their projections, which
                other rankers may share.
            beam_width: prefixes kept per step; at least k are kept in any case.
            max_history: only a row's last items up to this number are read, as in training.
            batch_size: histories searched at once, which bounds the memory.
            normalize: "level" or "children", see `beam_search`.
            cuda_graphs: False searches kernel by kernel.

        Raises:
            InputError: if a number is below 1, the normalisation is unknown, the model has no decoder, the tokenizer's
                codes are not those that the model writes, or the items are missing or do not fit.
        """
        check_settings("GenerativeRanker", beam_width=beam_width, max_history=max_history, batch_size=batch_size)
        if normalize not in get_args(Normalize):
            known = " or ".join(map(repr, get_args(Normalize)))
            raise InputError(f"GenerativeRanker expected normalize to be {known}, got {normalize!r}.")
        if not model.config.writes_codes:
            raise InputError(
                "generative and hybrid retrieval need a model with a decoder; this one was trained with "
                "RetrievalModelConfig.sid_loss_weight = 0. Use mode dense, or train with a weight above 0."
            )
        self.model = model
        self.beam_width = beam_width
        self.max_history = max_history
        self.batch_size = batch_size
        self._normalize = normalize
        self._cuda_graphs = cuda_graphs
        reads_items = model.config.items is not None or items is not None
        self.projected = ProjectedItems.of(model, items) if reads_items else None
        self.refresh(tokenizer)

    def refresh(self, tokenizer: SemanticIdTokenizer, items: ItemTable | None = None) -> None:
        """Take over a catalogue to which items were added or from which some were removed; recordings begin anew.

        Args:
            tokenizer: of the new catalogue.
            items: of the new catalogue, for a model that reads item features; None where none have changed.

        Raises:
            InputError: if the tokenizer's codes are not those that the model writes, no item is available, or the
                items do not fit; the ranker stays as it was.
        """
        model = self.model
        check_codes(type(self).__name__, model, tokenizer)
        if self.projected is not None:
            self.projected.check_rows(len(tokenizer.semantic_ids), items)
        trie = PrefixTrie.from_semantic_ids(tokenizer.semantic_ids, tokenizer.available)
        tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=model.language)
        if self.projected is not None and items is not None:
            self.projected.refresh(items)
        self._tokenize, self._trie = tokenize, trie
        self._device: torch.device | None = None
        self._item_vectors: Tensor | None = None

    def rank(self, histories: SeqBatch, k: int, allowed: ItemFilter | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest items per history; see `Ranker.rank`. Results lie where the histories lie.

        Raises:
            ValueError: if `allowed` is of other rows, or its flags of another catalogue.
            InputError: if the model's logits are not finite.
        """
        if allowed is not None:
            check_filter(allowed, num_rows=len(histories), num_items=self._trie.num_item_ids)
        device = next(self.model.parameters()).device
        self._follow(device)
        num_rows, home = len(histories), histories.item_ids.device
        item_ids = torch.full((num_rows, k), NO_ITEM, device=device)
        scores = torch.full((num_rows, k), -torch.inf, device=device)
        broken = []
        query = Query(last_items(replace(histories, targets=None), self.max_history), max(self.beam_width, k), allowed)
        query = self._with_flags_on_device(query)
        with evaluation_mode(self.model), _autocast_without_cache(device) as precision:
            for rows, part in _parts(query, self.batch_size):
                num_found = len(part.histories)
                if self._search.records:
                    part = part.to_capacity(self.batch_size, self.max_history)
                found_ids, found_scores, found_broken = self._search(part, mode=precision)
                item_ids[rows] = found_ids[:num_found, :k]
                scores[rows] = found_scores[:num_found, :k]
                broken.append(found_broken[:, :num_found].clone())  # a replay overwrites what the last one returned
        if broken:
            raise_if_broken(torch.cat(broken, dim=1))
        return item_ids.to(home), scores.to(home)

    def _follow(self, device: torch.device) -> None:
        """Trie, tokenizer and recordings follow the model's device, item vectors its weights."""
        item_vectors = None if self.projected is None else self.projected.vectors()
        if device == self._device and item_vectors is self._item_vectors:
            return
        self._device, self._item_vectors = device, item_vectors
        self._trie = self._trie.to(device)
        self._tokenize.to(device)
        self._search = ops.GraphedCall(
            self._find,
            device=device,
            name="beam search",
            enabled=self._cuda_graphs,
            memory=[*self.model.parameters(), *([] if item_vectors is None else [item_vectors])],
            max_shapes=_MAX_SHAPES,
        )

    def _with_flags_on_device(self, query: Query) -> Query:
        """What is the same for all rows is brought to the device, and summed up, once for all parts."""
        if query.allowed is None or query.allowed.allowed is None:
            return query
        sums = self._trie.allowed_before(query.allowed.allowed.to(self._trie.device))
        return replace(query, allowed=replace(query.allowed, allowed=None), allowed_before=sums)

    def _find(self, query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """What `search_beams` returns."""
        leaf_filter = None
        if query.allowed is not None:
            leaf_filter = self._trie.leaf_filter(query.allowed, query.allowed_before)
        return self._search_trie(self._tokenize(query.histories), query.width, leaf_filter)

    def _search_trie(
        self, tokens: TokenizedSeqBatch, width: int, leaf_filter: ops.LeafFilter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return search_beams(self._step_model(), tokens, self._trie, width, leaf_filter, self._normalize)

    def _step_model(self) -> StepModel:
        return self.model if self._item_vectors is None else WithItems(self.model, self._item_vectors)


def _parts(query: Query, num_rows: int) -> Iterator[tuple[slice, Query]]:
    """The query in parts of at most `num_rows` rows, as `parts_of` parts histories."""
    for rows, histories in parts_of(query.histories, num_rows):
        allowed = query.allowed
        if allowed is not None and len(histories) < len(allowed):
            allowed = allowed.part(rows)
        yield rows, replace(query, histories=histories, allowed=allowed)


@contextmanager
def _autocast_without_cache(device: torch.device) -> Iterator[torch.dtype | None]:
    """Autocast as it is, but weights are cast anew every time: a recording must not keep what was cast before it.

    Yields:
        the autocast dtype, None where autocast is off.
    """
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield dtype if enabled else None
