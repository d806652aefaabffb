"""Compiled kernels against PyTorch on a GPU; `tests/kernels` compares the same kernels in the interpreter."""

import functools
import itertools

import pytest
import torch

import ops
from tests.gpu.accuracy import (
    DTYPES,
    TINY,
    WITHOUT_CASE,
    Case,
    Size,
    assert_accurate,
    assert_deterministic,
    cases,
)

NAMES = list(cases(TINY))
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def real_cases() -> dict[str, Case]:
    return cases(Size())


@pytest.fixture(autouse=True)
def exact_fp32():
    """PyTorch's products too."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


def test_every_op_has_a_case():
    assert {name.partition(",")[0] for name in NAMES} == set(ops.__all__) - WITHOUT_CASE


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("name", "dtype"), itertools.product(NAMES, DTYPES), ids=str)
def test_error_is_at_most_twice_that_of_pytorch(name, dtype):
    assert_accurate(real_cases()[name], dtype, "cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("name", "dtype"), itertools.product(NAMES, DTYPES), ids=str)
def test_two_runs_give_the_same_bits(name, dtype):
    assert_deterministic(real_cases()[name], dtype, "cuda")


@pytest.mark.gpu
@on_a_gpu
def test_kernels_are_the_default():
    assert ops.describe_backend("cuda").startswith("ops run as Triton")


def test_a_wrong_kernel_is_seen(monkeypatch):
    """The comparison itself, without a GPU: a result that is off by two percent is too far off for fp32."""
    wrong = torch.ones(())

    def slightly_wrong(x, residual, weight, **options):
        normed, total = add_rms_norm(x, residual, weight, **options)
        return (normed * (1.02 if ops.backend._override == "triton" else 1.0) * wrong, total)

    add_rms_norm = ops.add_rms_norm
    monkeypatch.setattr(ops.backend, "uses_triton", lambda device_type: False)
    monkeypatch.setattr(ops.layers, "uses_triton", lambda device_type: False)
    case = cases(TINY)["add_rms_norm"]
    assert_accurate(case, torch.float32, "cpu")
    monkeypatch.setattr(ops, "add_rms_norm", slightly_wrong)
    with pytest.raises(AssertionError, match="output 0"):
        assert_accurate(case, torch.float32, "cpu")
