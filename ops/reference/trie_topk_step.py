"""One step of an exact beam search over a prefix trie."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops.reference.leaf_filter import LeafFilter, leaf_range

NO_CANDIDATE = torch.iinfo(torch.int64).min
"""Key of a place without a child that may be reached."""

_PLACE_BITS = 32


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
    """See `ops.trie_topk_step`.

    Every beam has room for K children, since codes of one node's edges differ. Places ascend by beam, then edge, hence
    by node.
    """
    num_rows, num_beams, num_codes = logits.shape
    begins = row_ptr[nodes.clamp(min=0)][:, :, None]
    edges = begins + torch.arange(num_codes, device=logits.device)
    exists = (nodes >= 0)[:, :, None] & (edges < row_ptr[nodes.clamp(min=0) + 1][:, :, None])
    edges = edges.clamp(max=len(edge_codes) - 1).long()
    codes = edge_codes[edges].long()
    logits = logits.float()
    own = logits.gather(2, codes)
    if normalize == "level":
        own = own - logits.logsumexp(2, keepdim=True)
    elif normalize == "children":
        own = own - own.masked_fill(~exists, -torch.inf).logsumexp(2, keepdim=True)
    candidates = scores[:, :, None] + own
    exists &= ~candidates.isnan()
    if leaf_filter is not None:
        rows = torch.arange(num_rows, device=logits.device)[:, None, None].expand_as(edges)
        exists &= leaf_filter.permits(rows, *leaf_range(edges, leaf_begins))

    nowhere = num_beams * num_codes
    keys = sort_keys(candidates.flatten(1), torch.arange(nowhere, device=logits.device), exists.flatten(1))
    places, found = best_places(keys, beam_width)
    places = torch.where(found, places, nowhere)

    def placed(values: Tensor, filler: float) -> Tensor:
        return pad(values.flatten(1), (0, 1), value=filler).gather(1, places)

    parents = torch.where(found, places // num_codes, 0)
    return parents, placed(codes, 0), placed(edges, -1), placed(candidates, -torch.inf)


def sort_keys(scores: Tensor, places: Tensor, exists: Tensor) -> Tensor:
    """Distinct int64 that order places by score, and the lower one of equal scores higher.

    Args:
        scores: fp32, numbers where `exists`; both zeros are equal.
        places: int64 from 0 to 2^31.
        exists: bool; where it is false the key is NO_CANDIDATE.
    """
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return torch.where(exists, (ordered << _PLACE_BITS) - places, NO_CANDIDATE)


def best_places(keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The places of the highest keys [B, P] of every row, ascending.

    Returns:
        places [B, width] int64, and [B, width] bool which of them are places: a row's last ones may not be.
    """
    keys = keys.topk(min(width, keys.shape[1]), dim=1, sorted=False).values
    nowhere = 1 << _PLACE_BITS
    places = torch.where(keys == NO_CANDIDATE, nowhere, -keys & (nowhere - 1)).sort(dim=1).values
    places = pad(places, (0, width - places.shape[1]), value=nowhere)
    return places, places < nowhere
