"""Every number that a kernel returns is compared by its test: changing one of them a little makes the test fail."""

import pytest
import torch
from torch import Tensor

from tests.kernels.library_ops import check_of, kernel_modules, ops_of, wrapped

CHANGE = 0.1
"""By which share the largest element of a floating-point output is changed; whole numbers are changed by one."""

OPS = [(module, name) for module, found in sorted(kernel_modules().items()) for name in sorted(ops_of(found))]


def outputs_of(value):
    return value if isinstance(value, tuple | list) else (value,)


def changed(tensor: Tensor) -> Tensor:
    """A copy whose largest element differs."""
    flat = tensor.flatten().clone()
    largest = flat.nan_to_num(posinf=0.0, neginf=0.0).abs().argmax()
    if tensor.is_floating_point():
        flat[largest] += CHANGE * flat[largest] if flat[largest] != 0 else CHANGE
    else:
        flat[largest] -= 1
    return flat.view(tensor.shape)


class Calls:
    """Stands in for an op: counts its outputs, and changes the one numbered `mutate` at every call."""

    def __init__(self, op, mutate=None):
        self.op, self.mutate, self.sizes = op, mutate, {}

    def __call__(self, *arguments, **options):
        value = self.op(*arguments, **options)
        outputs = list(outputs_of(value))
        for index, output in enumerate(outputs):
            self.sizes[index] = max(self.sizes.get(index, 0), output.numel())
            if index == self.mutate and output.numel():
                outputs[index] = changed(output)
        return outputs[0] if isinstance(value, Tensor) else type(value)(outputs)


def run(device, module, name, mutate=None):
    """The module's check, in which one output of one op may be changed; the op's calls."""
    modules = kernel_modules()
    calls = Calls(ops_of(modules[module])[name], mutate)
    with wrapped(modules[module], lambda other, op: calls if other == name else op):
        check_of(module)(device, torch.float32)
    return calls


@pytest.mark.parametrize(("module", "name"), OPS, ids=lambda value: value)
def test_a_changed_output_fails(device, module, name):
    sizes = run(device, module, name).sizes
    assert sizes, f"check of tests/kernels/test_{module}.py never calls {name}"
    unseen = []
    for index in (index for index, size in sizes.items() if size):
        try:
            run(device, module, name, index)
        except AssertionError:
            continue
        unseen.append(index)
    assert unseen == [], f"nobody sees a change of outputs {unseen} of {name}"


def test_there_are_ops():
    assert ("add_rms_norm", "BACKWARD") in OPS
