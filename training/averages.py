"""The moving average of a model's weights, which often generalises better than the weights of any one step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving averages of a model's trainable parameters (Polyak and Juditsky 1992).

    They start as copies of the parameters; update n (from 0) keeps min(decay, (1 + n) / (10 + n)) of them, so that the
    first weights are soon forgotten. Buffers and parameters that do not learn by gradient are the model's own.

    Args:
        model: on the device where it is trained.
        decay: share of the averages that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        # The parameters themselves: preparing a model for several processes may give them other memory.
        self._names = list(trained)
        self._weights: list[Tensor] = list(trained.values())
        self._averages = [value.detach().clone() for value in self._weights]
        self._num_updates = torch.zeros((), device=self._weights[0].device)

    @torch.no_grad()
    def restart_(self) -> None:
        """Begin anew with the present weights."""
        torch._foreach_copy_(self._averages, self._weights)
        self._num_updates.zero_()

    @torch.no_grad()
    def update_(self, counts: Tensor) -> None:
        """Take in the present weights; computed on the device without waiting, so that graphs can record it.

        torch.optim.swa_utils needs a decay that the host knows, and averages in every step.

        Args:
            counts: [] fp32, 1, or 0 for a step that must change nothing.
        """
        kept = ((1 + self._num_updates) / (10 + self._num_updates)).clamp(max=self._decay)
        moves = torch._foreach_sub(self._weights, self._averages)
        torch._foreach_mul_(moves, (1 - kept) * counts)
        torch._foreach_add_(self._averages, moves)
        self._num_updates += counts

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages; afterwards, even after an error, with its own weights again."""
        own = [value.detach().clone() for value in self._weights]
        try:
            self._set_weights_(self._averages)
            yield
        finally:
            self._set_weights_(own)

    @torch.no_grad()
    def _set_weights_(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._weights, values)

    def state_dict(self) -> dict[str, Any]:
        """The averages by the parameters' names, and the number of updates; not copied."""
        averages = dict(zip(self._names, self._averages, strict=True))
        return {"averages": averages, "num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take saved averages over.

        Raises:
            ValueError: if they are of other parameters.
        """
        saved = state["averages"]
        if {name: value.shape for name, value in saved.items()} != {
            name: value.shape for name, value in zip(self._names, self._averages, strict=True)
        }:
            raise ValueError("its averages are of other parameters than this run trains.")
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(saved[name])
        self._num_updates.copy_(state["num_updates"])
