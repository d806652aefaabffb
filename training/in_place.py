"""What a loss changes in the model besides giving gradients, and how to put it back."""

import torch
from torch import Tensor, nn


class InPlaceChanges:
    """What a loss writes into the model: moving averages, counters, restarted codes.

    Buffers may change in any step. Parameters rarely do, and torch counts the writes to each: the first step copies
    all, later ones those that were written to in a step before. A parameter that a later step is the first to write
    to cannot be put back in that one.

    Args:
        model: its tensors keep their addresses. Buffers that checkpoints leave out are taken for constants.
    """

    def __init__(self, model: nn.Module) -> None:
        saved = model.state_dict(keep_vars=True).values()  # the model's own tensors
        self._buffers = [value for value in saved if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
        self._parameters = list(model.parameters())
        self._written: set[int] | None = None
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._versions: list[int] = []

    def begin(self) -> None:
        """Before the losses of a step."""
        numbers = range(len(self._parameters)) if self._written is None else sorted(self._written)
        tensors = self._buffers + [self._parameters[number] for number in numbers]
        self._copied = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._versions = self._current_versions()

    @torch.no_grad()
    def end(self, undo: Tensor) -> None:
        """After them and before the optimizer: where `undo` ([] bool) is true, put back what they have changed."""
        pairs = zip(self._versions, self._current_versions(), strict=True)
        now = {number for number, (before, after) in enumerate(pairs) if before != after}
        for tensor, copy in self._copied:
            torch.where(undo, copy, tensor, out=tensor)
        self._written = now | (self._written or set())
        self._copied = []

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]
