import math
from functools import partial

import pytest
import torch

import ops
from ops.reference.catalogue_cross_entropy import catalogue_cross_entropy as reference
from ops.triton import catalogue_cross_entropy as kernels
from tests.kernels.harness import DTYPES, compare, randn
from tests.kernels.recompiles import num_graphs

SCALE = 1.7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of rows, items and, for fp32, columns, and parts to add up, at sizes that suit the interpreter."""
    blocks = kernels._blocks
    monkeypatch.setattr(kernels, "_MAX_WIDTH", 32)
    monkeypatch.setattr(kernels, "_NUM_PROGRAMS", 6)
    monkeypatch.setattr(kernels, "_MEAN_TILE", 32)
    monkeypatch.setattr(kernels, "_blocks", lambda *sizes: blocks(*sizes) | {"ROWS": 16, "ITEMS": 16})


def case(num_rows, num_items, width):
    return {"queries": randn(num_rows, width), "items": randn(num_items, width, seed=1)}


def targets(num_rows, num_items, ignored=-1):
    """Targets among items whose number is no multiple of seven; one in five rows is ignored."""
    wanted = torch.randint(1 << 30, (num_rows,), generator=torch.Generator().manual_seed(2)) % num_items
    wanted = torch.where(wanted % 7 == 0, (wanted + 1) % num_items, wanted)
    return torch.where(torch.arange(num_rows) % 5 == 3, ignored, wanted)


def check(device, dtype, inputs=None, exclude=True, scale=SCALE):
    """The mean is multiplied by the number of rows, so that gradients are not smaller than what may differ."""
    inputs = case(35, 45, 20) if inputs is None else inputs
    num_rows, num_items = len(inputs["queries"]), len(inputs["items"])
    target = targets(num_rows, num_items)
    excluded = torch.arange(num_items) % 7 == 0 if exclude else None
    flags = None if excluded is None else excluded.to(device)

    def kernel(queries, items):
        loss = ops.catalogue_cross_entropy(queries, items, target.to(device), scale=scale, excluded=flags)
        return num_rows * loss[None]

    def exact(queries, items):
        return num_rows * reference(queries, items, target, scale, excluded, -1)[None]

    compare(kernel, exact, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (16, 32, 16), (3, 70, 17), (35, 7, 5)], ids=str)
def test_odd_sizes(device, shape):
    check(device, torch.float32, case(*shape), exclude=False)


def test_shipped_tiles(device, monkeypatch):
    monkeypatch.undo()
    check(device, torch.float32, case(37, 70, 70))


def test_large_scores(device):
    """Far beyond what exponentials of fp32 hold, and, for half precision, beyond the dtype's own range."""
    check(device, torch.float32, scale=3000.0)
    queries, items = torch.tensor([[300.0, 0.0]]), torch.tensor([[300.0, 0.0], [299.0, 0.0], [0.0, 0.0]])
    half = [value.to(device, torch.float16) for value in (queries, items)]
    loss = ops.catalogue_cross_entropy(*half, torch.tensor([1], device=device), scale=0.01)
    torch.testing.assert_close(loss.cpu(), torch.tensor(3.0486), rtol=1e-4, atol=0)


def test_rows_without_target_pass_no_gradient(device):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 9, 4).items()}
    excluded = torch.ones(9, dtype=torch.bool, device=device)
    loss = ops.catalogue_cross_entropy(**inputs, target=torch.full((5,), -7, device=device), ignore_index=-7)
    of_all_excluded = ops.catalogue_cross_entropy(
        **inputs, target=torch.full((5,), -1, device=device), excluded=excluded, scale=1e4
    )
    for value in (loss, of_all_excluded):
        assert value.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(value, list(inputs.values())))


def test_a_wrong_target_on_a_device_gives_nan(device, monkeypatch):
    monkeypatch.setattr(ops.checks, "_reads_values", lambda tensor: False)
    queries, items = torch.zeros(1, 4, device=device), torch.zeros(5, 4, device=device)
    excluded = torch.tensor([False, False, True, False, False], device=device)
    losses = [
        ops.catalogue_cross_entropy(queries, items, torch.tensor([target], device=device), excluded=excluded)
        for target in (1, 2, 5, -2, 1 + (1 << 32), -1)
    ]
    assert torch.stack(losses).isnan().tolist() == [False, True, True, True, True, False]


def test_gradients_of_unlikely_items_in_fp16(device):
    """Their probabilities are below what fp16 holds; fp16 training scales its loss to keep gradients."""
    queries = torch.tensor([[1.0]]).to(device, torch.float16)
    items = torch.tensor([[0.0], [-18.0], [-18.0]]).to(device, torch.float16).requires_grad_()
    loss = ops.catalogue_cross_entropy(queries, items, torch.tensor([0], device=device))
    (grad,) = torch.autograd.grad(loss * 65536, items)
    expected = torch.full((2, 1), 65536 * math.exp(-18.0))
    torch.testing.assert_close(grad[1:].float().cpu(), expected, rtol=2e-2, atol=0)


def test_each_gradient_is_made_where_it_is_wanted(device, monkeypatch):
    seen = []
    backward = kernels.BACKWARD
    monkeypatch.setattr(kernels, "BACKWARD", lambda *arguments: seen.append(arguments[-2:]) or backward(*arguments))
    inputs, target = case(5, 9, 4), torch.arange(5, device=device)
    for wanted in (("queries",), ("items",), ("queries", "items")):
        tensors = {name: value.detach().to(device).requires_grad_(name in wanted) for name, value in inputs.items()}
        ops.catalogue_cross_entropy(**tensors, target=target).backward()
        assert [tensor.grad is not None for tensor in tensors.values()] == [name in wanted for name in inputs]
    assert seen == [(True, False), (False, True), (True, True)]


def test_autocast_multiplies_in_its_dtype(device):
    inputs = {name: value.to(device).requires_grad_() for name, value in case(5, 9, 4).items()}
    target = torch.arange(5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = ops.catalogue_cross_entropy(**inputs, target=target, scale=SCALE)
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    expected = ops.catalogue_cross_entropy(**rounded, target=target, scale=SCALE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(value, list(inputs.values())) for value in (loss, expected)]
    assert grads[0][0].dtype == torch.float32
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_strides_and_a_second_backward(device):
    queries = randn(4, 5).to(device).t().requires_grad_()
    items = randn(1, 4, seed=1).to(device).expand(9, 4).requires_grad_()
    loss = ops.catalogue_cross_entropy(queries, items, torch.arange(10, device=device)[::2], scale=SCALE)
    exact = [value.detach().cpu().requires_grad_() for value in (queries, items)]
    expected = torch.autograd.grad(reference(*exact, torch.arange(10)[::2], SCALE, None, -1), exact)
    first = torch.autograd.grad(loss, (queries, items), retain_graph=True)
    second = torch.autograd.grad(loss, (queries, items), retain_graph=True)
    for one, again, wanted in zip(first, second, expected, strict=True):
        torch.testing.assert_close(one.cpu(), wanted)
        torch.testing.assert_close(again, one, rtol=0, atol=0)


def test_parts_of_the_catalogue():
    assert kernels._parts(35, 45, 16, 16) == (2, 32)
    assert kernels._parts(1, 45, 16, 16) == (3, 16)
    assert kernels._parts(1000, 45, 16, 16) == (1, 48)


def test_library_rules(device):
    queries, items = (value.to(device) for value in case(5, 9, 4).values())
    target, excluded = torch.arange(5, device=device), torch.arange(9, device=device) > 6
    given = queries, items, target, excluded
    torch.library.opcheck(kernels.FORWARD, (*given, SCALE, -1))
    _, lse, count = kernels.FORWARD(*given, SCALE, -1)
    grad = torch.ones((), device=device)
    torch.library.opcheck(kernels.BACKWARD, (grad, *given, lse, count, SCALE, -1, True, True))
    torch.library.opcheck(kernels.BACKWARD, (grad, *given[:3], None, lse, count, SCALE, -1, False, True))


def test_compiles_in_one_graph(device):
    inputs = [value.to(device).requires_grad_() for value in case(5, 9, 4).values()]
    op = partial(ops.catalogue_cross_entropy, target=torch.arange(5, device=device), scale=SCALE)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(run(*inputs), inputs) for run in (compiled, op))
    torch.testing.assert_close(got, expected)


def test_one_graph_for_any_number_of_rows(device):
    op = partial(ops.catalogue_cross_entropy, scale=SCALE)
    calls = (
        (*(value.to(device).requires_grad_() for value in case(rows, 9, 4).values()), torch.arange(rows, device=device))
        for rows in (5, 7, 8)
    )
    assert num_graphs(op, calls) == 1
