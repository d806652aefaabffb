"""CUDA graphs: a function of a batch is recorded once per shape and replayed, all its kernels for one launch.

Small models are bound by kernel launches. Recording asks for static shapes and addresses, so batches have one of few
fixed capacities and are copied into buffers that stay. What a recorded function must keep to:

- It is a function of the batch's tensors, and of tensors that are changed in place (weights, optimizer state). Python
  runs while recording only: a Python value that changes between calls belongs into the batch, as a tensor where it
  changes often, as a plain value where it takes few values, each of which is recorded.
- It never waits for the device: no `.item()`, no boolean mask as index, no copy to the host.
- What it leaves behind in memory of its own is gone at the next call.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ops.backend import say_once
from ops.checks import waits_for_devices

Output = TypeVar("Output")

_failed: list[torch.cuda.CUDAGraph] = []
"""Torch's allocator goes on asking a graph whose recording failed, so it must not be freed."""


class Recorder(Protocol):
    """Runs functions and records them; `CudaRecorder`, or a stand-in for tests."""

    def run(self, function: Callable[[], Output]) -> Output:
        """Run once, now."""
        ...

    def record(self, function: Callable[[], Output]) -> Callable[[], Output]:
        """Record without running; the result replays and returns the same tensors every time."""
        ...


@dataclass
class _Entry:
    """What is kept for batches of one shape."""

    batch: Any
    num_calls: int = 0
    replay: Callable[[], Any] | None = None


class GraphedCall(Generic[Output]):
    """Calls a function of a batch, from the third batch of a shape on as a CUDA graph.

    Every call runs the function exactly once for its batch: the first ones as they are, on the stream that will
    record (they compile kernels and create what is created once, such as optimizer state), the next ones by replay.

    Args:
        function: of one batch, see the head of this file. Batches are tensors, or dataclasses of tensors and plain
            hashable values; returns tensors or anything that holds them.
        device: where it runs. Elsewhere than on CUDA devices it is just called.
        name: for messages.
        enabled: False just calls it everywhere.
        memory: tensors whose storage the function reads or writes in place, such as parameters: when one of them
            has moved, all recordings are dropped and begin anew.
        warmup: calls of each shape before it is recorded, at least one.
        max_shapes: batches of further shapes run without a graph.
    """

    def __init__(
        self,
        function: Callable[[Any], Output],
        *,
        device: torch.device,
        name: str,
        enabled: bool = True,
        memory: Sequence[Tensor] = (),
        warmup: int = 2,
        max_shapes: int = 16,
    ) -> None:
        if warmup < 1:
            raise ValueError(f"GraphedCall expected warmup of at least 1, got {warmup}.")
        self._function = function
        self._device = device
        self._name = name
        self._memory = memory
        self._warmup = warmup
        self._max_shapes = max_shapes
        self._recorder = recorder_for(device) if enabled else None
        self._entries: dict[Hashable, _Entry] = {}
        self._addresses: tuple[int, ...] = ()

    @property
    def records(self) -> bool:
        """Whether calls are, or will be, replayed."""
        return self._recorder is not None

    @property
    def num_recorded(self) -> int:
        """Shapes that are replayed."""
        return sum(entry.replay is not None for entry in self._entries.values())

    def __call__(self, batch: Any, mode: Hashable = None) -> Output:
        """The function's result for a batch, wherever the batch lies.

        Replayed, the result's tensors are the same every time: the next call of any shape overwrites them.

        Args:
            batch: see above. Copies from pinned host memory do not wait.
            mode: anything else that the recording depends on, such as whether a model is in training mode.
        """
        self._forget_if_moved()
        entry = None if self._recorder is None else self._entry((mode, _shape(batch)), batch)
        if entry is None:
            return self._function(_mapped(batch, self._moved))
        _copy(batch, entry.batch)
        entry.num_calls += 1
        if entry.replay is None and entry.num_calls > self._warmup:
            entry.replay = self._recorded(entry)
        if entry.replay is not None:
            return entry.replay()
        return self._run(entry)

    def _run(self, entry: _Entry) -> Output:
        function, batch = self._function, entry.batch
        return function(batch) if self._recorder is None else self._recorder.run(lambda: function(batch))

    def _entry(self, key: Hashable, batch: Any) -> _Entry | None:
        """Of the batch's shape; None where there are too many."""
        entry = self._entries.get(key)
        if entry is None and len(self._entries) < self._max_shapes:
            entry = _Entry(_mapped(batch, self._buffer))
            self._entries[key] = entry
        if entry is None:
            say_once(
                f"{self._name}: batches came in more than {self._max_shapes} shapes; further shapes run without CUDA "
                "graphs, slower. Use batches of fixed capacities."
            )
        return entry

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=self._device.type == "cuda")

    def _buffer(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, copy=True, memory_format=torch.contiguous_format)

    def _recorded(self, entry: _Entry) -> Callable[[], Output] | None:
        """None, and no recording any more, if the function cannot be recorded; nothing has run then."""
        assert self._recorder is not None
        function, batch = self._function, entry.batch
        try:
            return self._recorder.record(lambda: function(batch))
        except Exception as error:
            cause = error.__context__ or error  # what ended the recording, rather than its invalid end
            summary = " ".join(str(cause).split())[:300]
            say_once(
                f"{self._name}: runs without CUDA graphs, slower, since recording failed: "
                f"{type(cause).__name__}: {summary}"
            )
            self._recorder = None
            self._entries.clear()
            return None

    def _forget_if_moved(self) -> None:
        if self._recorder is None:
            return
        addresses = tuple(tensor.data_ptr() for tensor in self._memory)
        if addresses == self._addresses:
            return
        if self._entries:  # their pool of memory ends with them
            self._entries.clear()
            self._recorder = recorder_for(self._device)
        self._addresses = addresses


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing does, or where OPS_DEBUG=1 looks at values."""
    return CudaRecorder(device) if device.type == "cuda" and not waits_for_devices() else None


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, on a stream of its own.

    Args:
        device: of the function's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Output]) -> Output:
        """Run on the recording stream, between what the current stream did before and will do after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Output]) -> Callable[[], Output]:
        """Record a graph; random numbers are new at every replay."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream)
        with _undone_on_failure(graph, self._device), _no_garbage_collection(), recording:
            output = function()

        def replay() -> Output:
            graph.replay()
            return output

        return replay


@contextmanager
def _undone_on_failure(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Put back what torch leaves behind when a recording fails: the current stream, and a generator that records."""
    stream = torch.cuda.current_stream(device)
    scratch = torch.zeros(1, device=device)
    try:
        yield
    except BaseException:
        _failed.append(graph)
        torch.cuda.set_stream(stream)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # ends for the generator, too
            scratch.zero_()
        raise


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Freeing a CUDA object of some dead cycle would spoil the recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{field.name: _mapped(getattr(batch, field.name), change) for field in fields(batch)})
    return batch


def _shape(batch: Any) -> Hashable:
    """Equal for batches that one recording serves."""
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch), tuple(_shape(getattr(batch, field.name)) for field in fields(batch))
    return type(batch), batch


@torch.no_grad()
def _copy(source: Any, target: Any) -> None:
    """Fill the target's tensors; both have one shape."""
    if isinstance(source, Tensor):
        target.copy_(source, non_blocking=True)
    elif is_dataclass(source) and not isinstance(source, type):
        for field in fields(source):
            _copy(getattr(source, field.name), getattr(target, field.name))
