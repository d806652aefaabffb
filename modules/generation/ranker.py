"""The generative ranker: beam search behind the Ranker contract of `evaluation/ranker.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import ops
from data.schemas import NO_ITEM, InputError, SeqBatch
from modules.generation.beam import raise_if_broken, search_beams
from modules.generation.trie import PrefixTrie
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer

_BUCKETS = 8
"""Numbers of items that batches of one number of rows are filled up to, for recording."""

_MAX_SHAPES = 64
"""Recordings that are kept: all buckets of eight numbers of rows."""


@dataclass(frozen=True, eq=False)
class _Query:
    """What the result of a search depends on.

    Attributes:
        histories: B rows, without targets.
        allowed: [N] or [B, N] bool, or None.
        width: of the beam.
    """

    histories: SeqBatch
    allowed: Tensor | None
    width: int

    def to_capacity(self, max_rows: int, max_history: int) -> "_Query":
        """Filled up to one of a few shapes with empty rows, and with items that belong to no row."""
        histories = self.histories
        num_rows = min(1 << (len(histories) - 1).bit_length(), max_rows)
        bucket = -(-num_rows * max_history // _BUCKETS)
        num_items = max(-(-len(histories.item_ids) // bucket), 1) * bucket
        filled = replace(histories.to_capacity(num_rows=num_rows, num_items=num_items), max_len=max_history)
        allowed = self.allowed
        if allowed is not None and allowed.dim() == 2:
            allowed = pad(allowed, (0, 0, 0, num_rows - len(histories)))
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
        *,
        beam_width: int = 20,
        max_history: int = 20,
        batch_size: int = 256,
        cuda_graphs: bool = True,
    ) -> None:
        """Build the trie of the tokenizer's catalogue.

        Args:
            model: used in evaluation mode on whatever device it lies at the time of a call.
            tokenizer: the one that the model was trained with.
            beam_width: prefixes kept per step; at least k are kept in any case.
            max_history: only a row's last items up to this number are read, as in training.
            batch_size: histories searched at once, which bounds the memory.
            cuda_graphs: False searches kernel by kernel.

        Raises:
            InputError: if a number is below 1, or the tokenizer's codes are not those that the model writes.
        """
        settings = {"beam_width": beam_width, "max_history": max_history, "batch_size": batch_size}
        for name, value in settings.items():
            if value < 1:
                raise InputError(f"GenerativeRanker expected {name} of at least 1, got {value}.")
        _check_codes(model, tokenizer)
        self.model = model
        self.beam_width = beam_width
        self.max_history = max_history
        self.batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self._trie = PrefixTrie.from_semantic_ids(tokenizer.semantic_ids)
        self._tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=model.language)
        self._device: torch.device | None = None

    def rank(self, histories: SeqBatch, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest items per history; see `Ranker.rank`. Results lie where the histories lie."""
        device = next(self.model.parameters()).device
        self._move_to(device)
        num_rows, home = len(histories), histories.item_ids.device
        item_ids = torch.full((num_rows, k), NO_ITEM, device=device)
        scores = torch.full((num_rows, k), -torch.inf, device=device)
        broken = torch.zeros(self._trie.num_levels, num_rows, dtype=torch.bool, device=device)
        histories = last_items(replace(histories, targets=None), self.max_history)
        with _evaluation_mode(self.model), _autocast_without_cache(device) as precision:
            for rows, chunk in _chunks(histories, self.batch_size):
                of_rows = allowed[rows] if allowed is not None and allowed.dim() == 2 else allowed
                query = _Query(chunk, of_rows, max(self.beam_width, k))
                if self._search.records:
                    query = query.to_capacity(self.batch_size, self.max_history)
                found_ids, found_scores, found_broken = self._search(query, mode=precision)
                item_ids[rows] = found_ids[: len(chunk), :k]
                scores[rows] = found_scores[: len(chunk), :k]
                broken[:, rows] = found_broken[:, : len(chunk)]
        raise_if_broken(broken)
        return item_ids.to(home), scores.to(home)

    def _move_to(self, device: torch.device) -> None:
        """Trie, tokenizer and recordings follow the model."""
        if device == self._device:
            return
        self._device = device
        self._trie = self._trie.to(device)
        self._tokenize.to(device)
        self._search = ops.GraphedCall(
            self._find,
            device=device,
            name="beam search",
            enabled=self._cuda_graphs,
            memory=list(self.model.parameters()),
            max_shapes=_MAX_SHAPES,
        )

    def _find(self, query: _Query) -> tuple[Tensor, Tensor, Tensor]:
        """What `search_beams` returns."""
        node_allowed = None if query.allowed is None else self._trie.allowed_nodes(query.allowed)
        return search_beams(self.model, self._tokenize(query.histories), self._trie, query.width, node_allowed)


def last_items(histories: SeqBatch, max_history: int) -> SeqBatch:
    """The batch with only the last `max_history` items of every row."""
    if histories.max_len <= max_history:
        return histories
    ends = histories.offsets[1:].long()
    lengths = histories.offsets.long().diff().clamp(max=max_history)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rows = torch.repeat_interleave(lengths)
    positions = torch.arange(len(rows), device=rows.device) + (ends - offsets[1:])[rows]
    return replace(
        histories, item_ids=histories.item_ids[positions], offsets=offsets.to(torch.int32), max_len=max_history
    )


def _chunks(batch: SeqBatch, num_rows: int) -> Iterator[tuple[slice, SeqBatch]]:
    """The batch in parts of at most `num_rows` rows, each with the rows that it holds."""
    if 0 < len(batch) <= num_rows:
        yield slice(0, len(batch)), batch
        return
    bounds = batch.offsets.tolist()
    for begin in range(0, len(batch), num_rows):
        end = min(begin + num_rows, len(batch))
        part = replace(
            batch,
            item_ids=batch.item_ids[bounds[begin] : bounds[end]],
            offsets=batch.offsets[begin : end + 1] - bounds[begin],
            user_hashes=batch.user_hashes[begin:end],
            targets=None if batch.targets is None else batch.targets[begin:end],
        )
        yield slice(begin, end), part


@contextmanager
def _autocast_without_cache(device: torch.device) -> Iterator[torch.dtype | None]:
    """Autocast as it is, but weights are cast anew every time: a recording must not keep what was cast before it.

    Yields:
        the autocast dtype, None where autocast is off.
    """
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield dtype if enabled else None


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_codes(model: EncoderDecoderRetrievalModel, tokenizer: SemanticIdTokenizer) -> None:
    expected = model.config.languages[model.language]
    if (model.language, expected) != (tokenizer.language, tokenizer.level_sizes):
        raise InputError(
            f"GenerativeRanker expected a tokenizer with {model.language!r} codes of sizes {expected}, which the model "
            f"writes; got {tokenizer.language!r} codes of sizes {tokenizer.level_sizes}. "
            "Use the tokenizer that the model was trained with."
        )
