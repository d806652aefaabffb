"""One step of an exact beam search over a prefix trie."""

import torch
from torch import Tensor
from torch.nn.functional import pad

_NO_CANDIDATE = torch.iinfo(torch.int32).min


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    node_allowed: Tensor | None = None,
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
    candidates = scores[:, :, None] + (logits.gather(2, codes) - logits.logsumexp(2, keepdim=True))
    exists &= ~candidates.isnan()
    if node_allowed is not None:
        rows = torch.arange(num_rows, device=logits.device)[:, None, None]
        exists &= node_allowed[edges] if node_allowed.dim() == 1 else node_allowed[rows, edges]

    keys = torch.where(exists, _ordered(candidates), _NO_CANDIDATE).flatten(1)
    keys, places = keys.sort(dim=1, descending=True, stable=True)
    nowhere = num_beams * num_codes
    places = torch.where(keys == _NO_CANDIDATE, nowhere, places)[:, :beam_width].sort(dim=1).values
    places = pad(places, (0, beam_width - places.shape[1]), value=nowhere)

    def placed(values: Tensor, filler: float) -> Tensor:
        return pad(values.flatten(1), (0, 1), value=filler).gather(1, places)

    parents = torch.where(places == nowhere, 0, places // num_codes)
    return parents, placed(codes, 0), placed(edges, -1), placed(candidates, -torch.inf)


def _ordered(x: Tensor) -> Tensor:
    """Int32 that compare as the fp32 numbers do, both zeros being equal; above _NO_CANDIDATE."""
    bits = (x + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
