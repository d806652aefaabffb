"""Row-wise concatenation of packed tensors and its inverse, without a host synchronisation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def jagged_concat(parts: Sequence[Tensor], offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.jagged_concat`."""
    num_tokens = [part.shape[0] for part in parts]
    packed = parts[0].new_zeros(sum(num_tokens), *parts[0].shape[1:])
    for part, own, places in zip(parts, offsets, _places(offsets, num_tokens), strict=True):
        packed = packed.index_copy(0, places, _without_tail(part, own))
    return packed, torch.stack(list(offsets)).sum(0, dtype=torch.int32)


def jagged_split(x: Tensor, offsets: Sequence[Tensor], num_tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """See `ops.jagged_split`."""
    return tuple(
        _without_tail(x[places], own) for places, own in zip(_places(offsets, num_tokens), offsets, strict=True)
    )


def _without_tail(part: Tensor, offsets: Tensor) -> Tensor:
    in_tail = torch.arange(part.shape[0], device=part.device) >= offsets[-1]
    return part.masked_fill(in_tail.view(-1, *[1] * (part.dim() - 1)), 0)


def _places(offsets: Sequence[Tensor], num_tokens: Sequence[int]) -> list[Tensor]:
    """For every part [T] int64: where its tokens lie in the concatenation.

    A token moves by what precedes it: its row in the parts before, the rows above in the parts behind. The tails of the
    parts count as a row more, so that no two tokens share a place.
    """
    bounds = [pad(own.long(), (0, 1), value=num_own) for own, num_own in zip(offsets, num_tokens, strict=True)]
    places = []
    for index, num_own in enumerate(num_tokens):
        above = [other[:-1] for other in bounds[index + 1 :]]
        moves = torch.stack([*(other[1:] for other in bounds[:index]), *above]).sum(0)
        moves = torch.repeat_interleave(moves, bounds[index].diff(), output_size=num_own)
        places.append(torch.arange(num_own, device=moves.device) + moves)
    return places
