"""Where rows lie, worked out once per batch."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

_MAX_PLANS = 4
"""Remembered: a training step needs three (encoder, decoder, cross attention)."""

_Plan = TypeVar("_Plan")


class PlanMemo(Generic[_Plan]):
    """The latest plans, so that the layers of a stack share one.

    Args:
        make: a plan from offsets, which are compared by value, and arguments that are compared as they are.
    """

    def __init__(self, make: Callable[..., _Plan]) -> None:
        self._make = make
        self._entries: tuple[tuple[Any, _Plan], ...] = ()

    def __call__(self, *arguments: Any) -> _Plan:
        """The plan of these arguments, made or remembered."""
        key = tuple(value.numpy().tobytes() if isinstance(value, Tensor) else value for value in arguments)
        entries = self._entries  # replaced, never changed: another thread may be reading them
        for known_key, plan in entries:
            if known_key == key:
                return plan
        plan = self._make(*arguments)
        self._entries = ((key, plan), *entries[: _MAX_PLANS - 1])
        return plan
