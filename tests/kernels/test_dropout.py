from functools import partial

import pytest
import torch

import ops
from ops.reference.dropout import dropout as reference
from ops.triton import dropout as kernels
from tests.kernels.harness import DTYPES, compare, randn, seed_on


def run(op, seed, dropout_p, *, x):
    return op(x, dropout_p=dropout_p, seed=seed)


def check(device, dtype, shape=(63, 100), dropout_p=0.3):
    kernel = partial(run, ops.dropout, seed_on(device), dropout_p)
    exact = partial(run, reference, seed_on("cpu"), dropout_p)
    compare(kernel, exact, {"x": randn(*shape)}, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(device, dtype, dropout_p):
    check(device, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("shape", [(1,), (70,), (0, 5), (5, 0), (3, 2, 7), (2, 2600)], ids=str)
def test_shapes(device, shape):
    check(device, torch.float32, shape)


@pytest.mark.parametrize("dropout_p", [1e-7, 0.9999999])
def test_probabilities_beyond_the_masks_resolution(device, dropout_p):
    x = torch.full((4, 33), 2.0, device=device, dtype=torch.float16, requires_grad=True)
    out = ops.dropout(x, dropout_p=dropout_p)
    out.sum().backward()
    assert out.tolist() == [[2.0 if dropout_p < 0.5 else 0.0] * 33] * 4
    assert x.grad.tolist() == [[1.0 if dropout_p < 0.5 else 0.0] * 33] * 4


def test_seeds_of_its_own_differ_and_follow_the_generator(device):
    x = torch.ones(64, 64, device=device)
    torch.manual_seed(0)
    first, second = ops.dropout(x, dropout_p=0.5), ops.dropout(x, dropout_p=0.5)
    torch.manual_seed(0)
    again = ops.dropout(x, dropout_p=0.5)
    assert torch.equal(first, again)
    assert 0.4 < (first != second).float().mean().item() < 0.6


def test_inputs_and_gradients_with_holes(device):
    x = randn(8, 6).to(device).t().requires_grad_()
    ops.dropout(x, dropout_p=0.3, seed=seed_on(device)).sum().backward()
    expected = reference(torch.ones(6, 8), 0.3, seed_on("cpu"))
    torch.testing.assert_close(x.grad.cpu(), expected)


def test_library_rules(device):
    x, seed = randn(5, 9).to(device), seed_on(device)
    for op in (kernels.FORWARD, kernels.BACKWARD):
        torch.library.opcheck(op, (x, seed, 0.3))


def test_compiles_in_one_graph(device):
    x, seed = randn(5, 9).to(device).requires_grad_(), seed_on(device)
    compiled = torch.compile(partial(run, ops.dropout, seed, 0.3), fullgraph=True, backend="aot_eager")
    out = compiled(x=x)
    out.sum().backward()
    torch.testing.assert_close(out, ops.dropout(x, dropout_p=0.3, seed=seed))
    torch.testing.assert_close(x.grad, ops.dropout(torch.ones_like(x), dropout_p=0.3, seed=seed))
