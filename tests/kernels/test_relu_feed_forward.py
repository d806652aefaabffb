from functools import partial

import pytest
import torch

import ops
from ops.reference.relu_feed_forward import relu_feed_forward as reference
from ops.triton import relu_feed_forward as kernels
from tests.kernels.harness import DTYPES, compare, randn, seed_on
from tests.kernels.recompiles import num_graphs


def case(num_rows, width, hidden):
    return {
        "x": randn(num_rows, width),
        "w_in": randn(hidden, width, seed=1) * width**-0.5,
        "w_out": randn(width, hidden, seed=2) * hidden**-0.5,
    }


def run(op, seed, dropout_p, *, x, w_in, w_out):
    return op(x, w_in, w_out, dropout_p=dropout_p, seed=seed)


def check(device, dtype, inputs=None, dropout_p=0.3):
    kernel = partial(run, ops.relu_feed_forward, seed_on(device), dropout_p)
    exact = partial(run, reference, seed_on("cpu"), dropout_p)
    compare(kernel, exact, inputs or case(63, 20, 100), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(device, dtype, dropout_p):
    check(device, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 1, 1), (3, 4, 2500)], ids=str)
def test_odd_sizes(device, shape):
    check(device, torch.float32, case(*shape))


def test_nan_is_not_hidden(device):
    x = torch.tensor([[torch.nan, 1.0], [2.0, 1.0]], device=device)
    out = ops.relu_feed_forward(x, torch.eye(2, device=device), torch.eye(2, device=device))
    assert out.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("dropout_p", [1e-7, 0.9999999])
def test_probabilities_beyond_the_masks_resolution(device, dropout_p):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 4, 9).items()}
    out = run(ops.relu_feed_forward, seed_on(device), dropout_p, **inputs)
    gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(part.isfinite().all() for part in (out, *gradients))
    assert bool(out.any()) == (dropout_p < 0.5)


def test_autocast_and_gradients_with_holes(device):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 4, 9).items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = run(ops.relu_feed_forward, seed_on(device), 0.3, **inputs)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    exact = {name: value.detach().cpu().double().requires_grad_() for name, value in inputs.items()}
    expected = torch.autograd.grad(run(reference, seed_on("cpu"), 0.3, **exact).sum(), list(exact.values()))
    for got, wanted in zip(gradients, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0.05, atol=0.05)


def test_library_rules(device):
    x, w_in, w_out = (value.to(device) for value in case(5, 4, 9).values())
    torch.library.opcheck(kernels.FORWARD, (x, w_in, w_out, seed_on(device), 0.3))
    torch.library.opcheck(kernels.FORWARD, (x, w_in, w_out, None, 0.0))
    torch.library.opcheck(kernels.BACKWARD, (x, x, randn(5, 9).to(device).relu(), w_in, w_out, 0.3))


def test_compiles_in_one_graph(device):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 4, 9).items()}
    op = partial(run, ops.relu_feed_forward, seed_on(device), 0.3)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(**inputs).sum(), list(inputs.values())) for run in (compiled, op)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_graph_for_any_number_of_rows(device):
    op = partial(ops.relu_feed_forward, dropout_p=0.3, seed=seed_on(device))
    inputs = (tuple(value.to(device).requires_grad_() for value in case(rows, 4, 9).values()) for rows in (5, 7, 11))
    assert num_graphs(op, inputs) == 1
