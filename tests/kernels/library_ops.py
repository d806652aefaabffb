"""Finds the library's ops, and the comparison that tests each; nothing here is a list that could fall behind."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch._ops import OpOverload

import ops.triton
from ops.triton.library import NAMESPACE


def ops_of(module: ModuleType) -> dict[str, OpOverload]:
    """Library ops that a module defines, by the global name through which its autograd functions call them."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, OpOverload)}
    return {name: value for name, value in found.items() if value.namespace == NAMESPACE}


def kernel_modules() -> dict[str, ModuleType]:
    """Modules of ops/triton that define library ops, by their last name."""
    modules = {}
    for found in pkgutil.iter_modules(ops.triton.__path__):
        module = importlib.import_module(f"ops.triton.{found.name}")
        if ops_of(module):
            modules[found.name] = module
    return modules


def checks_of(name: str) -> list[Callable[[torch.device, torch.dtype], None]]:
    """Comparisons of every output and gradient of the module's ops with the reference.

    They are the functions `check...(device, dtype)` of the module's test; further arguments have defaults.
    """
    test = importlib.import_module(f"tests.kernels.test_{name}")
    functions = [value for key, value in vars(test).items() if key.startswith("check") and inspect.isfunction(value)]
    found = [function for function in functions if _required(function) == ["device", "dtype"]]
    if not found:
        raise AssertionError(f"tests/kernels/test_{name}.py has no function check(device, dtype)")
    return found


def check_of(name: str) -> Callable[[torch.device, torch.dtype], None]:
    """All of `checks_of`, one after the other."""
    checks = checks_of(name)

    def check(device: torch.device, dtype: torch.dtype) -> None:
        for one in checks:
            one(device, dtype)

    return check


def _required(function: Callable[..., None]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.default is inspect.Parameter.empty and one.kind not in kinds]


@contextmanager
def wrapped(module: ModuleType, wrap: Callable[[str, OpOverload], Callable[..., Any]]) -> Iterator[None]:
    """Within the block, the module calls `wrap(name, op)` in place of each of its ops."""
    with ExitStack() as stack:
        for name, op in ops_of(module).items():
            stack.enter_context(mock.patch.object(module, name, wrap(name, op)))
        yield
