"""Optimizers: built from the loop's settings, with a rate that changes, saved without what depends on the machine."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, AdamW, Optimizer
from torch.torch_version import TorchVersion

from data.schemas import InputError
from training.loop_config import LoopConfig
from training.parameter_groups import ParameterGroup, grouped_parameters

_FACTOR = "learning_rate_factor"
"""What a group of the optimizer knows besides torch's own settings: its rate is the loop's times this."""


def build_optimizer(model: nn.Module, config: LoopConfig, *, recorded: bool) -> Optimizer:
    """The optimizer of a model's trainable parameters; those of groups with factor 0 are trainable no more.

    Args:
        model: on the device where it is trained.
        config: names the optimizer and the groups.
        recorded: its steps are recorded in CUDA graphs: AdamW whose rates are tensors on the device.

    Raises:
        InputError: if nothing is trainable, if a group names nothing, or if this torch has no such optimizer there.
    """
    groups = []
    for group, parameters in grouped_parameters(model, config.parameter_groups):
        if group.learning_rate_factor == 0:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        elif parameters:
            groups.append(_optimizer_group(group, parameters, config, recorded))
    if not groups:
        raise InputError("the model has no trainable parameters.")
    # Fused ones can be told on the device to change nothing, see step_unless_.
    if config.optimizer == "adagrad":
        _require_fused_adagrad(next(model.parameters()).device)
        return Adagrad(groups, fused=True)
    return AdamW(groups, fused=True, capturable=recorded)


def _require_fused_adagrad(device: torch.device) -> None:
    if device.type == "cuda" and TorchVersion(torch.__version__) < "2.12":
        raise InputError(
            f'LoopConfig.optimizer = "adagrad" needs torch 2.12 on CUDA devices, got {torch.__version__}. Use "adamw".'
        )


def _optimizer_group(
    group: ParameterGroup, parameters: Mapping[str, nn.Parameter], config: LoopConfig, recorded: bool
) -> dict[str, Any]:
    rate = config.learning_rate * group.learning_rate_factor
    device = next(iter(parameters.values())).device
    return {
        "params": list(parameters.items()),
        "lr": torch.tensor(rate, device=device) if recorded else rate,
        "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        _FACTOR: group.learning_rate_factor,
    }


def set_rate_(optimizer: Optimizer, rate: float) -> None:
    """Set the loop's learning rate, of which each group takes its factor.

    A rate on the device is filled in place, without waiting.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group[_FACTOR])
        else:
            group["lr"] = rate * group[_FACTOR]


def step_unless_(optimizer: Optimizer, skip: Tensor) -> None:
    """One step; where `skip` is 1, weights and moments stay as they are. Does not wait for the device to know.

    Args:
        optimizer: of `build_optimizer`.
        skip: [] fp32, 0 or 1.
    """
    vars(optimizer)["found_inf"] = skip  # where a GradScaler puts it
    try:
        optimizer.step()
    finally:
        del vars(optimizer)["found_inf"]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps, with the rates as plain numbers."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def load_optimizer_state_(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take the moments of a checkpoint; rate, weight decay and the rest stay as this run has set them.

    Raises:
        ValueError: if the state is that of another model, optimizer or division into groups.
    """
    moment = "sum" if isinstance(optimizer, Adagrad) else "exp_avg"
    if any(moment not in moments for moments in state["state"].values()):
        raise ValueError(f"the state is not that of {type(optimizer).__name__}.")
    _require_same_groups(state["param_groups"], optimizer.param_groups)
    settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _require_same_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Moments are found by their number, so each group must hold the parameters that it held."""
    if len(saved) == 1 and "param_names" not in saved[0]:  # before there were groups
        saved = [{**saved[0], "param_names": own[0]["param_names"]}]
    before, now = (
        {name: number for number, group in enumerate(groups) for name in group["param_names"]}
        for groups in (saved, own)
    )
    moved = [name for name in before | now if before.get(name) != now.get(name)]
    if moved:
        raise ValueError(
            f"its parameters were trained in other groups (LoopConfig.parameter_groups), or were others; {len(moved)} "
            f"of them, the first {moved[0]}."
        )
