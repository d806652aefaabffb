"""Every op of the library has a fake kernel and passes PyTorch's own check of custom ops."""

import functools

import pytest
import torch
from torch import Tensor

from ops.triton.library import NAMESPACE
from tests.kernels.library_ops import check_of, kernel_modules, ops_of, wrapped
from tests.kernels.poison import poisoned_memory

OPS = {op.name(): module for module, found in sorted(kernel_modules().items()) for op in ops_of(found).values()}


def copied(value):
    """Tensors detached from the run that they were recorded in."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def samples(module, device):
    """Arguments of the first call of each op of a module while its check runs."""
    found = {}

    def wrap(name, op):
        def call(*arguments):
            found.setdefault(op.name(), copied(arguments))
            return op(*arguments)

        return call

    with wrapped(kernel_modules()[module], wrap):
        check_of(module)(device, torch.float32)
    return found


def test_all_ops_are_known():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    assert registered == {name.removesuffix(".default") for name in OPS}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, name):
    arguments = samples(OPS[name], device).get(name)
    assert arguments is not None, f"check of tests/kernels/test_{OPS[name]}.py never calls {name}"
    op = getattr(getattr(torch.ops, NAMESPACE), name.partition("::")[2].removesuffix(".default")).default
    # Numbers that nobody reads, such as statistics of the tail, may stay unwritten, but two runs are compared.
    with poisoned_memory(0.5):
        torch.library.opcheck(op, tuple(arguments))
