"""A model's weights on the disk, and a model of them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from data.schemas import InputError, read_safetensors
from modules.systems import System


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as one safetensors file."""
    save_file({name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}, path)


def build_model(weights: Path, system: System, config: dict[str, Any] | None) -> nn.Module:
    """The model of a config with saved weights.

    Args:
        weights: file that `save_weights` wrote.
        system: what the model is.
        config: that its `to_dict` gave; None where an artifact has none.

    Raises:
        InputError: if the weights are not those of such a model, or the config has unknown names or values.
    """
    try:
        model = system.model_class(system.config_class.from_dict(config))
        model.load_state_dict(read_safetensors(weights))
    except (KeyError, TypeError, RuntimeError) as error:  # no model config; weights of other names or shapes
        raise InputError(f"{weights.parent} contradicts itself ({error}). Copy or save the artifact again.") from error
    return model


def moved(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on a device; InputError where torch cannot use that."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by what is wrong with the device
        reason = str(error).splitlines()[0]
        raise InputError(f"the model cannot be put on the device {str(device)!r}: {reason}. Try cpu.") from error


@contextmanager
def full_disk_is_os_error() -> Iterator[None]:
    """A full disk reaches Python from safetensors as an error of its own; here it becomes an OSError like others."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
