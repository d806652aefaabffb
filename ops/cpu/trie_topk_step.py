"""One step of an exact beam search over a prefix trie, on packed candidates."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.reference.leaf_filter import LeafFilter, leaf_range
from ops.reference.trie_topk_step import NO_CANDIDATE, best_places, sort_keys


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    normalize: str = "level",
    leaf_filter: LeafFilter | None = None,
    leaf_begins: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best children of every row's beams; see `ops.trie_topk_step`.

    Candidates are kept packed (T of them, all rows together). Because a row's beams ascend by node number, so do its
    candidates, and "lowest place" means "lowest code tuple".
    """
    num_rows, num_beams = nodes.shape
    beams, edges = _children(nodes.flatten(), row_ptr)
    codes, rows = edge_codes[edges].long(), beams // num_beams
    candidates = scores.flatten()[beams] + _log_probabilities(logits, beams, codes, normalize)
    exists = ~candidates.isnan()
    if leaf_filter is not None:
        exists &= leaf_filter.permits(rows, *leaf_range(edges, leaf_begins))

    counts = torch.bincount(rows, minlength=num_rows)
    begins = counts.cumsum(0) - counts
    places = torch.arange(len(rows)) - begins[rows]
    keys = places.new_full((num_rows, int(counts.max()) if num_rows else 0), NO_CANDIDATE)
    keys[rows, places] = sort_keys(candidates, places, exists)
    places, found = best_places(keys, beam_width)
    winners = torch.where(found, begins[:, None] + places, len(rows))

    def placed(values: Tensor, filler: float) -> Tensor:
        return pad(values, (0, 1), value=filler)[winners]

    return placed(beams % num_beams, 0), placed(codes, 0), placed(edges, -1), placed(candidates, -torch.inf)


def _children(nodes: Tensor, row_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """For every child of every node: the position in `nodes` and the edge number; node -1 has no children."""
    begins = row_ptr[nodes.clamp(min=0)].long()
    degrees = torch.where(nodes < 0, 0, row_ptr[nodes.clamp(min=0) + 1].long() - begins)
    beams = torch.repeat_interleave(degrees)
    within = torch.arange(len(beams)) - (degrees.cumsum(0) - degrees)[beams]
    return beams, begins[beams] + within


def _log_probabilities(logits: Tensor, beams: Tensor, codes: Tensor, normalize: str) -> Tensor:
    """[T] of the candidates: child `codes` of beam `beams`, in logits [B, W, K]."""
    if normalize == "none":
        return logits[beams // logits.shape[1], beams % logits.shape[1], codes].float()
    logits = logits.float().flatten(0, 1)
    own = logits.flatten()[beams * logits.shape[1] + codes]
    if normalize == "level":
        return own - logits.logsumexp(1)[beams]
    highest = own.new_full((len(logits),), -torch.inf).scatter_reduce_(0, beams, own, "amax")
    highest = torch.where(highest.isinf(), 0.0, highest)
    sums = torch.zeros_like(highest).index_add_(0, beams, (own - highest[beams]).exp())
    return own - (sums.log() + highest)[beams]
