from functools import partial

import pytest
import torch

import ops
from ops.reference.add_rms_norm import add_rms_norm as reference
from tests.kernels.harness import DTYPES, compare, randn, seed_on


def case(num_rows, width, *, residual=True):
    inputs = {"x": randn(num_rows, width), "residual": randn(num_rows, width, seed=1), "weight": randn(width, seed=2)}
    return inputs if residual else {name: value for name, value in inputs.items() if name != "residual"}


def run(op, seed, dropout_p, *, x, weight, residual=None):
    return op(x, residual, weight, eps=1e-6, dropout_p=dropout_p, seed=seed)


def check(device, dtype, inputs, dropout_p=0.3):
    kernel = partial(run, ops.add_rms_norm, seed_on(device), dropout_p)
    exact = partial(run, reference, seed_on("cpu"), dropout_p)
    compare(kernel, exact, inputs, dtype=dtype, device=device, keep_dtype=("weight",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(device, dtype, dropout_p):
    check(device, dtype, case(63, 100), dropout_p)


@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_odd_numbers_of_rows(device, num_rows):
    check(device, torch.float32, case(num_rows, 16))


def test_without_residual(device):
    check(device, torch.float32, case(5, 24, residual=False))


def test_wider_than_a_block_of_rows(device):
    check(device, torch.float32, case(3, 5000))
