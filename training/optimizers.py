"""Optimizers: built from the loop's settings, with a rate that changes, saved without what depends on the machine."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, AdamW, Optimizer

from data.schemas import InputError
from training.loop_config import LoopConfig


def build_optimizer(model: nn.Module, config: LoopConfig, *, recorded: bool) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    Args:
        model: on the device where it is trained.
        config: names the optimizer.
        recorded: its steps are recorded in CUDA graphs: AdamW whose rate is a tensor on the device.

    Raises:
        InputError: if nothing is trainable.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the model has no trainable parameters.")
    if config.optimizer == "adagrad":
        return Adagrad(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    device = parameters[0].device
    rate = torch.tensor(config.learning_rate, device=device) if recorded else config.learning_rate
    fused = device.type in ("cpu", "cuda")
    return AdamW(parameters, lr=rate, weight_decay=config.weight_decay, fused=fused, capturable=recorded)


def set_rate_(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter; a rate on the device is filled in place, without waiting."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps, with the rate as a plain number."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def load_optimizer_state_(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take the moments of a checkpoint; rate, weight decay and the rest stay as this run has set them.

    Raises:
        ValueError: if the state is that of another model or optimizer.
    """
    moment = "sum" if isinstance(optimizer, Adagrad) else "exp_avg"
    if any(moment not in moments for moments in state["state"].values()):
        raise ValueError(f"the state is not that of {type(optimizer).__name__}.")
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
