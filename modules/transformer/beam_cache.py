"""What generation keeps of the decoder's self attention between steps."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.backend import to_autocast_dtype


@dataclass(eq=False)
class _Memory:
    """Keys and values [layers, S, B, slots, 2, H, D], shared by a cache and its forks."""

    entries: Tensor | None = None


class BeamCache:
    """Keys and values of all steps in one piece of memory, and who descends from whom. Nothing is ever reordered.

    Args:
        num_rows: B.
        num_layers: of the decoder.
        bias: [H, S] relative bias of the last step's query towards all S steps.

    Attributes:
        ancestors: [B, W, steps] int64 slots of each beam's ancestors, its own slot last.
    """

    def __init__(self, num_rows: int, num_layers: int, bias: Tensor) -> None:
        self.ancestors = torch.zeros(num_rows, 1, 0, dtype=torch.int64, device=bias.device)
        self._num_layers = num_layers
        self._bias = bias
        self._memory = _Memory()

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return self.ancestors.shape[2]

    @property
    def bias(self) -> Tensor:
        """[H, steps] relative bias of the newest step's query."""
        return self._bias[:, self._bias.shape[1] - self.num_steps :]

    def fork(self) -> "BeamCache":
        """A second future of the same past, in the same memory: this cache must not be used before the fork is done.

        Whatever the fork writes lies behind the steps that both have taken.
        """
        return copy.copy(self)

    def advance_(self, parents: Tensor) -> None:
        """Extend the ancestry: beam w of the next step follows beam parents[:, w] ([B, W] int64) of the last one."""
        inherited = self.ancestors.gather(1, parents[:, :, None].expand(-1, -1, self.num_steps))
        own = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
        self.ancestors = torch.cat([inherited, own[:, :, None]], dim=2)

    def write_(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """Add a layer's keys and values of the newest step: x [B, W, E] times weight [2 * H * D, E].

        Returns:
            [S, B, slots, 2, H, D], that layer's cache.
        """
        x, weight = to_autocast_dtype(x, weight)
        entries = self._with_room_for(x, len(weight))
        entry = entries[layer, self.num_steps - 1, :, : x.shape[1]]
        if entry.is_contiguous() and not torch.is_grad_enabled():
            torch.mm(x.flatten(0, 1), weight.t(), out=entry.flatten(0, 1).flatten(1))
        else:
            entry.copy_(F.linear(x, weight).view(entry.shape))
        return entries[layer]

    def _with_room_for(self, x: Tensor, width: int) -> Tensor:
        """The first step has one beam: memory grows when beams become more, as a rule once."""
        old = self._memory.entries
        num_rows, num_beams, _ = x.shape
        if old is not None and num_beams <= old.shape[3]:
            return old
        num_heads, max_steps = self._bias.shape
        heads = (2, num_heads, width // (2 * num_heads))
        entries = x.new_empty(self._num_layers, max_steps, num_rows, num_beams, *heads)
        if old is not None:
            done = self.num_steps - 1
            entries[:, :done, :, : old.shape[3]].copy_(old[:, :done])
        self._memory.entries = entries
        return entries
