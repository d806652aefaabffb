"""Exact scores of every item, by walking the catalogue's trie with shared prefixes.

What beam search is measured against, and a ranker of its own where time does not matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ops
from data.schemas import NO_ITEM, ItemFilter, TokenizedSeqBatch
from modules.generation.beam import Normalize, StepModel, broken_rows, raise_if_broken
from modules.generation.ranker import GenerativeRanker
from modules.generation.trie import PrefixTrie

_MAX_BEAMS = 8192


@dataclass(frozen=True, eq=False)
class _Prefixes:
    """Consecutive nodes of one depth, the same for all rows, on their way into the model.

    Attributes:
        nodes: their numbers.
        codes: [n] int64, the last code of each; None for the root.
        parents: [n] int64, where its parent was among the nodes of the step before; None for the root.
        scores: [B, n] fp32 log-likelihoods.
    """

    nodes: range
    codes: Tensor | None
    parents: Tensor | None
    scores: Tensor


class _Walk:
    """Depth first over the trie, so that only one path of states is alive.

    Attributes:
        broken: [L, B] bool, as `search_beams` returns it.
    """

    def __init__(self, model: StepModel, batch: TokenizedSeqBatch, trie: PrefixTrie, normalize: Normalize) -> None:
        self._model, self._batch, self._trie, self._normalize = model, batch, trie, normalize
        self.broken = torch.zeros(trie.num_code_levels, len(batch), dtype=torch.bool, device=trie.device)

    def leaves(self, max_beams: int) -> Iterator[tuple[range, Tensor]]:
        """Consecutive leaves and their scores [B, n] fp32, all leaves in order."""
        if len(self._batch) == 0:
            return
        root = torch.zeros(len(self._batch), 1, device=self._trie.device)
        max_nodes = max(max_beams // len(self._batch), 1)
        yield from self._below(self._model.start(self._batch), 0, _Prefixes(range(1), None, None, root), max_nodes)

    def _below(self, state: Any, level: int, prefixes: _Prefixes, max_nodes: int) -> Iterator[tuple[range, Tensor]]:
        """The leaves below some nodes; `state` is used up."""
        row_ptr, edge_codes = self._trie.levels[level]
        bounds = row_ptr[prefixes.nodes.start : prefixes.nodes.stop + 1].long()
        first, last = int(bounds[0]), int(bounds[-1])
        parents = torch.repeat_interleave(bounds.diff(), output_size=last - first)
        codes = edge_codes[first:last].long()
        scores = prefixes.scores[:, parents]
        if level < self._trie.num_code_levels:
            scores = scores + self._log_probabilities(state, level, prefixes, parents, codes)
        if level + 1 == self._trie.num_levels:
            yield range(first, last), scores
            return
        for begin in range(first, last, max_nodes):
            end = min(begin + max_nodes, last)
            part = slice(begin - first, end - first)
            below = _Prefixes(range(begin, end), codes[part], parents[part], scores[:, part])
            # All parts but the last leave this state to those after them.
            part_state = state if end == last else state.fork()
            yield from self._below(part_state, level + 1, below, max_nodes)

    def _log_probabilities(self, state: Any, level: int, prefixes: _Prefixes, parents: Tensor, codes: Tensor) -> Tensor:
        """[B, E] fp32 of all edges that leave the nodes."""
        logits = self._model.step(state, *(self._for_all_rows(column) for column in (prefixes.codes, prefixes.parents)))
        self.broken[level] |= broken_rows(logits, self._trie, level)
        logits = logits.float()
        own = logits[:, parents, codes]
        if self._normalize == "children":
            return own - _log_sum_exp_of_groups(own, parents, logits.shape[1])[:, parents]
        return own - logits.logsumexp(2)[:, parents]

    def _for_all_rows(self, column: Tensor | None) -> Tensor | None:
        return None if column is None else column.expand(len(self._batch), -1).contiguous()


def _log_sum_exp_of_groups(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[B, num_groups] of values [B, E], whose column e belongs to group groups[e]."""
    rows = groups.expand_as(values)
    highest = values.new_full((len(values), num_groups), -torch.inf).scatter_reduce(1, rows, values, "amax")
    sums = torch.zeros_like(highest).scatter_add(1, rows, (values - highest[:, groups]).exp())
    return sums.log() + highest


@torch.no_grad()
def exact_scores(
    model: StepModel,
    batch: TokenizedSeqBatch,
    trie: PrefixTrie,
    *,
    normalize: Normalize = "level",
    max_beams: int = _MAX_BEAMS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-likelihood of every item, every prefix of the catalogue computed once per row.

    Memory does not grow with the catalogue: at most `max_beams` prefixes, or one per row, are in work, and one such
    set of decoder states per level is alive.

    Args:
        model: in evaluation mode; its state can `fork`.
        batch: B tokenized histories on the model's device.
        trie: on the same device.
        normalize: as for `beam_search`.
        max_beams: rows times nodes that the model reads at once.

    Yields:
        item_ids [n] int64 and scores [B, n] fp32, every item once, in ascending order of code tuples.

    Raises:
        InputError: if the model has fewer codes than the trie; and, behind the last item, if a logit was NaN or
            infinite.
    """
    walk = _Walk(model, batch, trie, normalize)
    for leaves, scores in walk.leaves(max_beams):
        yield trie.leaf_items[leaves.start : leaves.stop].long(), scores
    raise_if_broken(walk.broken)


@torch.no_grad()
def exact_top_k(
    model: StepModel,
    batch: TokenizedSeqBatch,
    trie: PrefixTrie,
    k: int,
    item_filter: ItemFilter | None = None,
    *,
    normalize: Normalize = "level",
    max_beams: int = _MAX_BEAMS,
) -> tuple[Tensor, Tensor]:
    """What `beam_search` with a beam as wide as the catalogue returns, in bounded memory.

    Args:
        model: as for `exact_scores`, as are batch, trie, normalize and max_beams.
        batch: B tokenized histories.
        trie: of the catalogue.
        k: items per row.
        item_filter: of the B rows; other items are never returned.
        normalize: see there.
        max_beams: see there.

    Returns:
        item_ids [B, k] int64, best first, equal scores in order of code tuple and item id, filled with -1; scores
        [B, k] fp32, filled with -inf.

    Raises:
        InputError: if a logit is NaN or infinite, or the model has fewer codes than the trie.
    """
    leaf_filter = None if item_filter is None else trie.leaf_filter(item_filter)
    item_ids, scores, broken = _top_k(model, batch, trie, k, leaf_filter, normalize, max_beams)
    raise_if_broken(broken)
    return item_ids, scores


def _top_k(
    model: StepModel,
    batch: TokenizedSeqBatch,
    trie: PrefixTrie,
    k: int,
    leaf_filter: ops.LeafFilter | None,
    normalize: Normalize,
    max_beams: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`exact_top_k` and broken [L, B]."""
    item_ids = torch.full((len(batch), k), NO_ITEM, device=trie.device)
    scores = torch.full((len(batch), k), -torch.inf, device=trie.device)
    rows = torch.arange(len(batch), device=trie.device)[:, None]
    walk = _Walk(model, batch, trie, normalize)
    for leaves, found in walk.leaves(max_beams):
        found_ids = trie.leaf_items[leaves.start : leaves.stop].long()
        found = found.masked_fill(found.isnan(), -torch.inf)  # a beam passes over them, too
        if leaf_filter is not None:
            first = torch.arange(leaves.start, leaves.stop, device=trie.device).expand_as(found)
            found = found.masked_fill(~leaf_filter.permits(rows.expand_as(found), first, first + 1), -torch.inf)
        # Stable: of equal scores, those found earlier come first, which have the lower tuples.
        scores, order = torch.cat([scores, found], dim=1).sort(dim=1, descending=True, stable=True)
        item_ids = torch.cat([item_ids, found_ids.expand(len(batch), -1)], dim=1).gather(1, order)
        scores, item_ids = scores[:, :k].contiguous(), item_ids[:, :k].contiguous()
    return item_ids.masked_fill(scores == -torch.inf, NO_ITEM), scores, walk.broken


class ExactRanker(GenerativeRanker):
    """Ranks every item by its exact score, as a beam as wide as the catalogue would, in bounded memory."""

    name = "exact"

    def __init__(self, *arguments: Any, max_beams: int = _MAX_BEAMS, **settings: Any) -> None:
        """As `GenerativeRanker`, whose beam width means nothing here; `max_beams` as for `exact_scores`."""
        super().__init__(*arguments, **{**settings, "cuda_graphs": False})
        self._max_beams = max_beams

    def _search_trie(
        self, tokens: TokenizedSeqBatch, width: int, leaf_filter: ops.LeafFilter | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _top_k(self._step_model(), tokens, self._trie, width, leaf_filter, self._normalize, self._max_beams)
