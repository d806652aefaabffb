"""The generative ranker: beam search behind the Ranker contract of `evaluation/ranker.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.schemas import NO_ITEM, InputError, SeqBatch
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from modules.model import EncoderDecoderRetrievalModel
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer


class GenerativeRanker:
    """Ranks items by the model's log-likelihood of their semantic ids, found by exact beam search over real items."""

    name = "generative"

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        tokenizer: SemanticIdTokenizer,
        *,
        beam_width: int = 20,
        max_history: int = 20,
        batch_size: int = 256,
    ) -> None:
        """Build the trie of the tokenizer's catalogue.

        Args:
            model: used in evaluation mode on whatever device it lies at the time of a call.
            tokenizer: the one that the model was trained with.
            beam_width: prefixes kept per step; at least k are kept in any case.
            max_history: only a row's last items up to this number are read, as in training.
            batch_size: histories searched at once, which bounds the memory.

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
        self._trie = PrefixTrie.from_semantic_ids(tokenizer.semantic_ids)
        self._tokenize = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary, language=model.language)

    def rank(self, histories: SeqBatch, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest items per history; see `Ranker.rank`. Results lie where the histories lie."""
        device = next(self.model.parameters()).device
        self._trie = self._trie.to(device)
        self._tokenize.to(device)
        item_ids = torch.full((len(histories), k), NO_ITEM, device=histories.item_ids.device)
        scores = torch.full((len(histories), k), -torch.inf, device=histories.item_ids.device)
        with _evaluation_mode(self.model):
            for rows, chunk in _chunks(last_items(histories, self.max_history), self.batch_size):
                tokens = self._tokenize(chunk.to(device))
                node_allowed = self._allowed_nodes(allowed, rows, device)
                width = max(self.beam_width, k)
                chunk_ids, chunk_scores = beam_search(self.model, tokens, self._trie, width, node_allowed)
                item_ids[rows] = chunk_ids[:, :k].to(item_ids.device)
                scores[rows] = chunk_scores[:, :k].to(scores.device)
        return item_ids, scores

    def _allowed_nodes(self, allowed: Tensor | None, rows: slice, device: torch.device) -> list[Tensor] | None:
        if allowed is None:
            return None
        of_rows = allowed[rows] if allowed.dim() == 2 else allowed
        return self._trie.allowed_nodes(of_rows.to(device))


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
