"""Stand-ins for CUDA graphs on a processor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
WAITING = (
    aten._local_scalar_dense.default,  # .item(), float(tensor), if tensor
    aten.equal.default,
    aten.lift_fresh.default,  # torch.tensor(...): a copy from the host
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
)


class TapeRecorder:
    """Records calls of ATen as a CUDA graph records kernels.

    Python runs once, while recording, and nothing it does then to tensors that were there before lasts. A replay
    repeats the calls on the same memory, so that a number which Python held then is held for good. What would wait
    for a GPU fails.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.log: list[str] = []

    def run(self, function: Callable[[], Any]) -> Any:
        self.log.append("run")
        return function()

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.log.append("record")
        random_state = torch.get_rng_state()
        tape = _Tape()
        try:
            with tape:
                output = function()
        finally:
            tape.undo()
            torch.set_rng_state(random_state)

        def replay() -> Any:
            self.log.append("replay")
            tape.replay()
            return output

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._kept_alive: list[Any] = []
        self._created: set[int] = set()
        self._overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._check_waits(call, args, kwargs)
        args, kwargs = tree_map(lambda value: value, (args, kwargs))  # lists may change afterwards
        self._keep_overwritten(call, args, kwargs)
        output = call(*args, **kwargs)
        self._kept_alive.append(output)
        self._created |= _storages(output) - _storages((args, kwargs))  # a view of a weight creates nothing
        self._calls.append((call, args, kwargs, output))
        return output

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in reversed(self._overwritten):
                tensor.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for call, args, kwargs, output in self._calls:
                fresh = call(*args, **kwargs)
                for kept, value in zip(tree_leaves(output), tree_leaves(fresh), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != value.data_ptr():
                        kept.copy_(value)

    def _check_waits(self, call, args, kwargs) -> None:
        by_mask = call is aten.index.Tensor and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        known_size = call is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
        if by_mask or (call in WAITING and not known_size):
            raise RuntimeError(f"{call} is not permitted while recording")

    def _keep_overwritten(self, call, args, kwargs) -> None:
        for position, argument in enumerate(call._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and not _storages(tensor) <= self._created:
                    self._overwritten.append((tensor, tensor.detach().clone()))


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}
