"""Launchers as ops of torch's library, which `torch.compile` and `opcheck` understand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "jagged_ops"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a launcher an op of the library; its autograd function stays outside, which is half as dear per call.

    Args:
        schema: such as "norm(Tensor x, float eps) -> Tensor"; outputs must be new tensors.
        launcher: allocates the outputs and starts kernels on the device of its tensors.
        fake: returns empty outputs of the right shapes and dtypes; runs no kernel.

    Returns:
        The op, to be called like the launcher.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, launcher, "CPU")
    _LIBRARY.impl(name, _on_own_device(launcher), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_own_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may not be the tensors'."""

    def launch(*arguments: Any, **options: Any) -> Any:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if device.index == torch.cuda.current_device():
            return launcher(*arguments, **options)
        with torch.cuda.device(device):
            return launcher(*arguments, **options)

    return launch
