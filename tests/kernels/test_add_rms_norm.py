from functools import partial

import pytest
import torch

import ops
from ops.reference.add_rms_norm import add_rms_norm as reference
from ops.triton import add_rms_norm as kernels
from tests.kernels.harness import DTYPES, compare, randn, seed_on
from tests.kernels.recompiles import num_graphs


def case(num_rows, width, *, residual=True):
    inputs = {"x": randn(num_rows, width), "residual": randn(num_rows, width, seed=1), "weight": randn(width, seed=2)}
    return inputs if residual else {name: value for name, value in inputs.items() if name != "residual"}


def run(op, seed, dropout_p, *, x, weight, residual=None):
    return op(x, residual, weight, eps=1e-6, dropout_p=dropout_p, seed=seed)


def check(device, dtype, inputs=None, dropout_p=0.3):
    kernel = partial(run, ops.add_rms_norm, seed_on(device), dropout_p)
    exact = partial(run, reference, seed_on("cpu"), dropout_p)
    compare(kernel, exact, inputs or case(63, 100), dtype=dtype, device=device, keep_dtype=("weight",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parity(device, dtype, dropout_p):
    check(device, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_odd_numbers_of_rows(device, num_rows):
    check(device, torch.float32, case(num_rows, 16))


def test_without_residual(device):
    check(device, torch.float32, case(5, 24, residual=False))


def test_wider_than_a_block_of_rows(device):
    check(device, torch.float32, case(3, 5000))


def test_a_program_walks_over_several_blocks_of_rows(device, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 2)
    check(device, torch.float32, case(63, 100))


@pytest.mark.parametrize("used", [0, 1], ids=["normed", "total"])
def test_gradient_of_one_output(device, used):
    inputs = {name: value for name, value in case(5, 24).items() if used == 0 or name != "weight"}
    weight = torch.ones(24)
    compare(
        lambda **given: run(ops.add_rms_norm, seed_on(device), 0.3, **{"weight": weight.to(device)} | given)[used],
        lambda **given: run(reference, seed_on("cpu"), 0.3, **{"weight": weight.double()} | given)[used],
        inputs,
        dtype=torch.float32,
        device=device,
    )


@pytest.mark.parametrize("dropout_p", [1e-7, 0.9999999])
def test_probabilities_beyond_the_masks_resolution(device, dropout_p):
    x, residual = torch.full((3, 20), 2.0, device=device), torch.ones(3, 20, device=device)
    _, total = ops.add_rms_norm(x, residual, torch.ones(20, device=device), dropout_p=dropout_p)
    torch.testing.assert_close(total, torch.full_like(total, 3.0 if dropout_p < 0.5 else 1.0))


def test_holes_in_inputs_and_gradients(device):
    x, weight = randn(24, 5).to(device).t().requires_grad_(), randn(24, seed=2).to(device)
    normed, total = ops.add_rms_norm(x, None, weight)
    (normed.sum() + total.sum()).backward()
    exact = x.detach().cpu().double().requires_grad_()
    sum(part.sum() for part in reference(exact, None, weight.cpu(), 1e-6, 0.0)).backward()
    torch.testing.assert_close(x.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_narrows_what_is_normed_alone(device, dtype):
    """The stream of a network with narrow products stays fp32, and so do its gradients."""
    x, residual, weight = (value.to(device) for value in case(5, 24).values())
    x, leaves = x.to(dtype).requires_grad_(), (residual.requires_grad_(), weight.requires_grad_())
    with torch.autocast(device.type, dtype=dtype):
        normed, total = ops.add_rms_norm(x, residual, weight)
    expected, expected_total = reference(x.detach().cpu().double(), residual.cpu().double(), weight.cpu(), 1e-6, 0.0)
    assert (normed.dtype, total.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(normed.cpu(), expected.to(dtype))
    torch.testing.assert_close(total.cpu(), expected_total.float())
    grads = torch.autograd.grad([normed, total], [x, *leaves], [torch.ones_like(normed), torch.ones_like(total)])
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


def test_float64_goes_to_the_reference(device):
    x, weight = randn(5, 24).double().to(device), torch.ones(24, device=device, dtype=torch.float64)
    normed, _ = ops.add_rms_norm(x, None, weight)
    torch.testing.assert_close(normed, x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt())


def test_rows_that_no_program_holds_go_to_the_reference(device, caplog):
    width = 16385
    normed, _ = ops.add_rms_norm(torch.ones(1, width, device=device), None, torch.ones(width, device=device))
    torch.testing.assert_close(normed, torch.ones_like(normed))
    assert f"runs in PyTorch for rows of {width} elements" in caplog.text


def test_library_rules(device):
    x, residual, weight, seed = randn(5, 24).to(device), randn(5, 24).to(device), randn(24).to(device), seed_on(device)
    torch.library.opcheck(kernels.FORWARD, (x, residual, weight, seed, 1e-6, 0.3, torch.bfloat16))
    torch.library.opcheck(kernels.FORWARD, (x, None, weight, None, 1e-6, 0.0, torch.float32))
    rstd = torch.rand(5, device=device)
    torch.library.opcheck(kernels.BACKWARD, (x, x, residual, rstd, weight, seed, 0.3, torch.float32, True))
    torch.library.opcheck(kernels.BACKWARD, (x, None, residual, rstd, weight, None, 0.0, torch.bfloat16, False))


def test_compiles_in_one_graph(device):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 24).items()}
    op = partial(run, ops.add_rms_norm, seed_on(device), 0.3)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(sum(part.sum() for part in function(**inputs)), list(inputs.values()))
        for function in (compiled, op)
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_graph_for_any_number_of_rows(device):
    op = partial(ops.add_rms_norm, dropout_p=0.3, seed=seed_on(device))
    inputs = (tuple(value.to(device).requires_grad_() for value in case(rows, 24).values()) for rows in (35, 37, 49))
    assert num_graphs(op, inputs) == 1
