"""Deterministic beam search over the prefix trie of a catalogue."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

import ops
from data.schemas import NO_ITEM, InputError, ItemFilter, TokenizedSeqBatch
from modules.generation.trie import PrefixTrie

Normalize = Literal["level", "children"]
"""What the log-softmax of a level goes over: all its codes, or those that continue a real item's prefix."""


class StepModel(Protocol):
    """A model that writes a target's codes level by level."""

    def start(self, batch: TokenizedSeqBatch) -> Any:
        """Read the histories once; the state that is returned has a method `fork`, as `DecoderState` has."""

    def step(self, state: Any, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        """Logits [B, W, K] of the next level, given the codes of the last one and the beams they continue."""


class ItemStepModel(StepModel, Protocol):
    """A model that can also read item vectors, as `EncoderDecoderRetrievalModel` does."""

    def start(self, batch: TokenizedSeqBatch, item_vectors: Tensor | None = None) -> Any:
        """As `StepModel.start`, with vectors [N, D] of the catalogue's items."""


@dataclass(frozen=True, eq=False)
class WithItems:
    """A model that reads item features, as generation takes it: with its item vectors in hand.

    Attributes:
        model: in evaluation mode.
        item_vectors: [N, D] from its `project_items`.
    """

    model: ItemStepModel
    item_vectors: Tensor

    def start(self, batch: TokenizedSeqBatch) -> Any:
        """See `StepModel.start`."""
        return self.model.start(batch, self.item_vectors)

    def step(self, state: Any, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        """See `StepModel.step`."""
        return self.model.step(state, codes, parents)


@torch.no_grad()
def beam_search(
    model: StepModel,
    batch: TokenizedSeqBatch,
    trie: PrefixTrie,
    beam_width: int,
    item_filter: ItemFilter | None = None,
    normalize: Normalize = "level",
) -> tuple[Tensor, Tensor]:
    """The items whose code tuples the model finds most likely.

    A score is the model's log-likelihood of the item's tuple, a sum over levels. With "level" each level's log-softmax
    goes over all its codes, also those that no item continues with: the probability that the model writes the tuple.
    With "children" it goes over the codes that continue a real item's prefix: the probability among real tuples, all of
    which together have 1. A filter changes no score.

    Only prefixes of permitted items are ever followed. Each step keeps the exact best `beam_width` prefixes, so a beam
    as wide as the catalogue equals scoring every item, and a row with that many permitted items gets `beam_width` of
    them. Equal scores are broken by the lower code tuple, then by the lower item id.

    Args:
        model: in evaluation mode; `WithItems(model, item_vectors)` if it reads item features.
        batch: B tokenized histories on the model's device.
        trie: on the same device.
        beam_width: prefixes kept per step; may exceed the number of items. On a GPU the kernels select up to 8,192 of
            up to 16,384 codes per beam; what is beyond runs in PyTorch, slower and in more memory.
        item_filter: of the B rows, on the same device; other items are never returned.
        normalize: see above.

    Returns:
        item_ids [B, beam_width] int64, best first, filled with -1; scores [B, beam_width] fp32, filled with -inf.
        An item of probability zero is not listed.

    Raises:
        InputError: if a logit is NaN or infinite, or the model has fewer codes than the trie.
    """
    leaf_filter = None if item_filter is None else trie.leaf_filter(item_filter)
    item_ids, scores, broken = search_beams(model, batch, trie, beam_width, leaf_filter, normalize)
    raise_if_broken(broken)
    return item_ids, scores


@torch.no_grad()
def search_beams(
    model: StepModel,
    batch: TokenizedSeqBatch,
    trie: PrefixTrie,
    beam_width: int,
    leaf_filter: ops.LeafFilter | None = None,
    normalize: Normalize = "level",
) -> tuple[Tensor, Tensor, Tensor]:
    """`beam_search` without a look at the device: a function of tensors that a CUDA graph can record.

    Returns:
        item_ids and scores as `beam_search` gives them, and broken [L, B] bool for `raise_if_broken`.

    Raises:
        InputError: if the model has fewer codes than the trie.
    """
    state = model.start(batch)
    nodes = torch.zeros(len(batch), 1, dtype=torch.int64, device=trie.device)
    scores = torch.zeros(len(batch), 1, device=trie.device)
    codes = parents = None
    broken = []
    for level in range(trie.num_code_levels):
        logits = model.step(state, codes, parents)
        broken.append(broken_rows(logits, trie, level))
        parents, codes, nodes, scores = _best_children(
            trie, level, logits, nodes, scores, beam_width, normalize, leaf_filter
        )
    if trie.num_levels > trie.num_code_levels:
        nodes, scores = _items_of_tuples(trie, nodes, scores, beam_width, leaf_filter)
    return *_ranked_items(trie, nodes, scores, beam_width), torch.stack(broken)


def _best_children(
    trie: PrefixTrie,
    level: int,
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    beam_width: int,
    normalize: str,
    leaf_filter: ops.LeafFilter | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parents, codes, nodes and scores, in beams no more than the level has nodes."""
    row_ptr, edge_codes = trie.levels[level]
    return ops.trie_topk_step(
        logits,
        nodes,
        scores,
        row_ptr,
        edge_codes,
        beam_width=min(beam_width, len(edge_codes)),
        normalize=normalize,
        leaf_filter=leaf_filter,
        leaf_begins=None if leaf_filter is None else trie.leaf_begins[level],
    )


def _items_of_tuples(
    trie: PrefixTrie, nodes: Tensor, scores: Tensor, beam_width: int, leaf_filter: ops.LeafFilter | None
) -> tuple[Tensor, Tensor]:
    """Leaves and their scores, those of their tuples: what the last level numbers is nothing a model knows."""
    nothing = torch.zeros(1, device=scores.device).expand(*nodes.shape, trie.max_items_per_tuple)
    return _best_children(trie, trie.num_code_levels, nothing, nodes, scores, beam_width, "none", leaf_filter)[2:]


def _ranked_items(trie: PrefixTrie, leaves: Tensor, scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Leaves in ascending order become items in descending order of score, the lower leaf first among equals."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    leaves = leaves.gather(1, order)
    item_ids = torch.where(scores == -torch.inf, NO_ITEM, trie.leaf_items[leaves.clamp(min=0)].long())
    missing = width - item_ids.shape[1]
    return pad(item_ids, (0, missing), value=NO_ITEM), pad(scores, (0, missing), value=-torch.inf)


def broken_rows(logits: Tensor, trie: PrefixTrie, level: int) -> Tensor:
    """[B] bool, rows of whose logits [B, W, K] no distribution can be made; InputError if K is less than the trie has.

    A GPU's host does not wait.
    """
    if logits.shape[-1] < trie.min_codes[level]:
        raise InputError(
            f"generation expected at least {trie.min_codes[level]} codes of level {level} from the model, "
            f"got {logits.shape[-1]}. Use the tokenizer that the model was trained with."
        )
    # The maximum is NaN, +inf or -inf exactly when no distribution can be made of the logits.
    return ~logits.amax(-1).isfinite().all(1)


def raise_if_broken(broken: Tensor) -> None:
    """Wait for the device once, and raise if a level of a row is flagged.

    Args:
        broken: [L, B] from `search_beams`.

    Raises:
        InputError: for the first one.
    """
    places = broken.nonzero()
    if len(places) == 0:
        return
    level, row = places[0].tolist()
    raise InputError(
        f"the model returned NaN or infinite logits at level {level} for {int(broken[level].sum())} of "
        f"{broken.shape[1]} histories (first: row {row}). Its weights are broken: use an earlier checkpoint, "
        "or train again with a lower learning rate or without mixed precision."
    )
