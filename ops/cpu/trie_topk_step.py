"""One step of an exact beam search over a prefix trie, on packed candidates."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def trie_topk_step(
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    row_ptr: Tensor,
    edge_codes: Tensor,
    beam_width: int,
    node_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best children of every row's beams; see `ops.trie_topk_step`.

    Candidates are kept packed (T of them, all rows together). Because a row's beams ascend by node number, so do its
    candidates, and "lowest index" means "lowest code tuple".
    """
    num_rows, num_beams = nodes.shape
    beams, edges = _children(nodes.flatten(), row_ptr)
    if node_allowed is not None:
        allowed = node_allowed[edges] if node_allowed.dim() == 1 else node_allowed[beams // num_beams, edges]
        beams, edges = beams[allowed], edges[allowed]
    codes = edge_codes[edges].long()
    logits = logits.float().flatten(0, 1)
    log_probabilities = logits.flatten()[beams * logits.shape[1] + codes] - logits.logsumexp(1)[beams]
    candidates = scores.flatten()[beams] + log_probabilities
    if bool(candidates.isnan().any()):
        numbers = ~candidates.isnan()
        beams, edges, codes, candidates = beams[numbers], edges[numbers], codes[numbers], candidates[numbers]

    rows = beams // num_beams
    winners, slots = _top_per_row(candidates, rows, num_rows, beam_width)
    places = rows[winners] * beam_width + slots

    def placed(values: Tensor, filler: float) -> Tensor:
        filled = values.new_full((num_rows * beam_width,), filler)
        filled[places] = values[winners]
        return filled.view(num_rows, beam_width)

    return placed(beams % num_beams, 0), placed(codes, 0), placed(edges, -1), placed(candidates, -torch.inf)


def _children(nodes: Tensor, row_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """For every child of every node: the position in `nodes` and the edge number; node -1 has no children."""
    begins = row_ptr[nodes.clamp(min=0)].long()
    degrees = torch.where(nodes < 0, 0, row_ptr[nodes.clamp(min=0) + 1].long() - begins)
    beams = torch.repeat_interleave(degrees)
    within = torch.arange(len(beams), device=nodes.device) - (degrees.cumsum(0) - degrees)[beams]
    return beams, begins[beams] + within


def _top_per_row(values: Tensor, rows: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Positions in `values` of the `width` largest of every row, ascending, and their slots 0, 1, ... in the row.

    Both arguments are packed [T], `rows` ascending. Equal values at the edge of the selection go to the lowest
    positions.
    """
    counts = torch.bincount(rows, minlength=num_rows)
    ends = counts.cumsum(0)
    begins = ends - counts
    longest = int(counts.max()) if num_rows else 0
    padded = values.new_full((num_rows, max(longest, width)), -torch.inf)
    padded[rows, torch.arange(len(rows), device=rows.device) - begins[rows]] = values
    threshold = padded.topk(width, sorted=True).values[:, -1][rows]

    above = pad((values > threshold).cumsum(0), (1, 0))
    room_for_ties = width - (above[ends] - above[begins])
    tied = values == threshold
    ties_so_far = pad(tied.cumsum(0), (1, 0))
    fits = ties_so_far[1:] - ties_so_far[begins][rows] <= room_for_ties[rows]
    winners = ((values > threshold) | (tied & fits)).nonzero().squeeze(1)
    first_slot = pad(torch.bincount(rows[winners], minlength=num_rows).cumsum(0), (1, 0))
    slots = torch.arange(len(winners), device=rows.device) - first_slot[rows[winners]]
    return winners, slots
