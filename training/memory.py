"""How much memory a training will take, before it takes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from data.schemas import InputError
from training.in_place import InPlaceChanges
from training.loop_config import LoopConfig
from training.random_state import random_state, restore_random_state
from training.task import Task

_MOMENTS = {"adamw": 2, "adagrad": 1}
"""Tensors that an optimizer keeps for every one that it trains."""
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training takes on its device, evaluation and short-lived buffers of single operations apart.

    Attributes:
        device: that computes.
        weights: parameters and buffers of the model.
        gradients: of the trainable parameters.
        moments: of the optimizer.
        averages: of the weights, if they are kept.
        checkpoint: the copy that is written while training goes on, if it lies in the device's memory.
        activations: what the loss of one batch keeps for its backward pass, the batch included.
        free: of the device, with the weights on it; None where that is not known.
    """

    device: str
    weights: int
    gradients: int
    moments: int
    averages: int
    checkpoint: int
    activations: int
    free: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self._parts().values())

    @property
    def fits(self) -> bool:
        """Whether what comes on top of the weights is free."""
        return self.free is None or self.total - self.weights <= self.free

    def describe(self) -> str:
        """One line for people; a warning if it does not fit."""
        listed = ", ".join(f"{name} {_size(value)}" for name, value in self._parts().items() if value)
        free = "" if self.free is None else f"; {_size(self.free)} free"
        line = f"training takes about {_size(self.total)} on {self.device}: {listed}{free}"
        if self.fits:
            return line
        return f"warning: {line}. Lower train.batch_size; LoopConfig.gradient_accumulation_steps makes up for it."

    def as_json(self) -> dict[str, int | str | None]:
        """The numbers by name."""
        return {**asdict(self), "total": self.total}

    def _parts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name not in ("device", "free")}


def estimate_memory(task: Task, config: LoopConfig, device: torch.device) -> MemoryEstimate:
    """Compute the loss of batch 0 and count what it keeps; the rest follows from the weights.

    Nothing remains of it: random states, and buffers that the loss changes, are put back. All processes of a run take
    part, since the loss of a quantizer may exchange counts.

    Args:
        task: its model lies on the device.
        config: names optimizer, precision and averages.
        device: where training will run.

    Raises:
        InputError: if not even this fits.
    """
    weights = sum(tensor.nbytes for tensor in _tensors(task.model))
    trained = sum(parameter.nbytes for parameter in task.model.parameters() if parameter.requires_grad)
    free = _free(device)
    try:
        with _leaving_no_trace(task.model, device):
            activations = _activations(task, config, device)
    except torch.OutOfMemoryError as error:
        size = "unknown" if free is None else _size(free)
        raise InputError(
            f"the loss of one batch does not fit into the memory of {device} ({size} free beside the weights). Lower "
            "train.batch_size; LoopConfig.gradient_accumulation_steps makes up for it."
        ) from error
    moments = _MOMENTS[config.optimizer] * trained
    averages = 0 if config.average_decay is None else trained
    return MemoryEstimate(
        device=str(device),
        weights=weights,
        gradients=trained,
        moments=moments,
        averages=averages,
        checkpoint=weights + moments + averages if device.type == "cpu" else 0,
        activations=activations,
        free=free,
    )


def _activations(task: Task, config: LoopConfig, device: torch.device) -> int:
    """Bytes of all storages that the loss of batch 0 keeps for its backward pass, those of the model apart."""
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors(task.model)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = _AUTOCAST.get(config.precision_on(device))
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    with autocast, saved_tensors_hooks(note, lambda tensor: tensor):
        task.loss(task.model, task.batch(0).to(device))
    return sum(kept.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _leaving_no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train the model inside, and put everything back but the cached memory, which is given back."""
    random, modes = random_state(device), [(module, module.training) for module in model.modules()]
    changes = InPlaceChanges(model)
    changes.begin()
    model.train()
    try:
        yield
    finally:
        changes.end(undo=torch.tensor(True, device=device))
        for module, mode in modes:
            module.training = mode
        restore_random_state(random, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # recorded steps have a pool of their own, which cannot use it


def _free(device: torch.device) -> int | None:
    """Bytes that can still be allocated: of the GPU, or of the machine on Linux."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and _MEMORY_INFO.is_file():
        for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _size(num_bytes: int) -> str:
    """In megabytes or gigabytes."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
