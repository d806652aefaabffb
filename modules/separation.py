"""What teaches an encoder that nearly equal items need ids of their own."""

import torch
from torch import Tensor

from modules.collective import own_rows, rows_of_all

_HASH_FACTOR = 6364136223846793005
"""Knuth's multiplier of 64-bit linear congruential generators."""

_NEXT_CODES = 15
"""As many rows of a tuple can be told to take different other codes; further ones are told the last of these."""


def separation_loss(residual: Tensor, codes: Tensor, codebook: Tensor, *, margin: float) -> Tensor:
    """How far rows that share all codes are from codes of their own on the last level.

    Of the rows on one tuple the nearest keeps its last code; the i-th nearest of the others, counted from 1, is to
    prefer its own i-th next-nearest code. The loss is what it is nearer to the shared code than to that one, in squared
    distances, plus the margin, as far as that is positive. So each row is moved by the least that changes its id, and
    only on the last level: prefixes go on to mean what they did. It is what `CollisionPolicy.NEAREST_FREE` does to ids,
    taught to the encoder. Rows of equal features stay together. Processes that train together look at the rows of all.

    Args:
        residual: [B, D], what the last level has to quantize; receives the gradient.
        codes: [B, L] int64, the nearest codes of all levels.
        codebook: [K, D] of the last level; receives no gradient.
        margin: in units of the rows' mean squared distance from their last codes.

    Returns:
        [B], 0 for rows that are alone on their tuple or nearest to its last code.
    """
    codebook = codebook.detach()
    distance = torch.cdist(residual.detach(), codebook).square()
    own = distance.gather(1, codes[:, -1:])[:, 0]
    own_of_all = rows_of_all(own)
    place = own_rows(_places_within_tuples(rows_of_all(codes), own_of_all))
    others = distance.scatter(1, codes[:, -1:], torch.inf)
    nearest = others.topk(min(_NEXT_CODES, max(len(codebook) - 1, 1)), dim=1, largest=False).indices
    wanted = nearest.gather(1, (place - 1).clamp(0, nearest.shape[1] - 1)[:, None])[:, 0]
    # |r - w|^2 - |r - c|^2 without the difference of large squares
    own_code, wanted_code = codebook[codes[:, -1]], codebook[wanted]
    gap = ((own_code - wanted_code) * (2 * residual - own_code - wanted_code)).sum(dim=1)
    return torch.where(place > 0, (gap + margin * own_of_all.mean()).clamp(min=0), 0.0)


def _places_within_tuples(codes: Tensor, own: Tensor) -> Tensor:
    """[B] int64: how many rows of the same codes [B, L] are nearer to their last code, by distances own [B]."""
    keys = codes.new_zeros(len(codes))
    for level in range(codes.shape[1]):  # a hash: a number of all levels could exceed 64 bits
        keys = keys * _HASH_FACTOR + codes[:, level] + 1
    order = own.argsort(stable=True)
    order = order[keys[order].argsort(stable=True)]
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[1:] = (codes[order[1:]] != codes[order[:-1]]).any(dim=1)
    numbers = torch.arange(len(order), device=codes.device)
    first = torch.where(begins, numbers, 0).cummax(dim=0).values if len(order) else numbers
    return torch.empty_like(order).index_copy_(0, order, numbers - first)
