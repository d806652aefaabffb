import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ops
from ops.cpu import catalogue_cross_entropy as implementation
from ops.reference.catalogue_cross_entropy import catalogue_cross_entropy as reference

SCALE = 1.7


def vectors(num_rows: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_BLOCK_ROWS", (4, 4))


def test_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    excluded = torch.tensor([False, False, True])
    loss = ops.catalogue_cross_entropy(queries, items, torch.tensor([0, 0, -1]), scale=2.0, excluded=excluded)
    # log(1 + exp(-2)) and log(1 + exp(4)), the third row without target
    torch.testing.assert_close(loss, torch.tensor((0.1269280 + 4.0181499) / 2))


@pytest.mark.parametrize("op", [ops.catalogue_cross_entropy, reference], ids=["cpu", "reference"])
def test_gradcheck(op: Callable[..., Tensor], small_blocks: None) -> None:
    target, excluded = torch.tensor([2, -1, 0, 4, 3, 3]), torch.tensor([False, True, False, False, False])
    named = {"scale": SCALE, "excluded": excluded, "ignore_index": -1}
    assert torch.autograd.gradcheck(partial(op, target=target, **named), (vectors(6, 3), vectors(5, 3, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_items", "scale"), [(63, 37, SCALE), (9, 1, 1.0), (5, 300, 1e3)])
def test_equals_the_reference(
    dtype: torch.dtype, num_rows: int, num_items: int, scale: float, small_blocks: None
) -> None:
    queries, items = vectors(num_rows, 5, dtype=dtype), vectors(num_items, 5, seed=1, dtype=dtype)
    target = torch.arange(num_rows) * 7 % num_items
    target[3::5] = -1
    exact = [value.detach().double().requires_grad_() for value in (queries, items)]
    loss, expected = (
        num_rows * op(*inputs, target, scale=scale, excluded=None, ignore_index=-1)
        for op, inputs in ((ops.catalogue_cross_entropy, (queries, items)), (reference, exact))
    )
    grads, wanted = torch.autograd.grad(loss, (queries, items)), torch.autograd.grad(expected, exact)
    assert loss.dtype == torch.float32
    for got, value in zip((loss, *grads), (expected, *wanted), strict=True):
        largest = max(float(value.detach().abs().max()), 1.0)
        # A score of bf16 is off by up to 2**-9 of itself, and a probability as much as its score.
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * largest
        torch.testing.assert_close(got.double(), value, rtol=0, atol=tolerance)


def test_means_of_nothing() -> None:
    queries, items = vectors(3, 4), vectors(5, 4, seed=1)
    for op in (ops.catalogue_cross_entropy, reference):
        for num_rows, excluded in ((3, torch.ones(5, dtype=torch.bool)), (3, None), (0, None)):
            target = torch.full((num_rows,), -1)
            loss = op(queries[:num_rows], items, target, scale=SCALE, excluded=excluded, ignore_index=-1)
            assert loss.item() == 0
            grads = torch.autograd.grad(loss, (queries, items))
            assert [grad.count_nonzero().item() for grad in grads] == [0, 0]


def test_only_what_is_wanted_is_made() -> None:
    queries, items, target = vectors(3, 4), vectors(5, 4, seed=1), torch.arange(3)
    expected = torch.autograd.grad(ops.catalogue_cross_entropy(queries, items, target), (queries, items))
    (alone,) = torch.autograd.grad(ops.catalogue_cross_entropy(queries.detach(), items, target), items)
    torch.testing.assert_close(alone, expected[1], rtol=0, atol=0)
    (alone,) = torch.autograd.grad(ops.catalogue_cross_entropy(queries, items.detach(), target), queries)
    torch.testing.assert_close(alone, expected[0], rtol=0, atol=0)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as records:
        ops.catalogue_cross_entropy(queries, items, target)
    products = [event.count for event in records.key_averages() if event.key in ("aten::mm", "aten::addmm_")]
    assert products == [1]


def test_a_second_backward_and_the_incoming_gradient() -> None:
    queries, items = vectors(9, 4), vectors(7, 4, seed=1)
    loss = ops.catalogue_cross_entropy(queries, items, torch.arange(9) % 7)
    first = torch.autograd.grad(loss, (queries, items), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (queries, items))
    for one, three in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, three)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_factors_and_not_the_loss(dtype: torch.dtype) -> None:
    queries, items = vectors(9, 4, dtype=torch.float32), vectors(7, 4, seed=1, dtype=torch.float32)
    target = torch.arange(9) % 7
    with torch.autocast("cpu", dtype=dtype):
        loss = ops.catalogue_cross_entropy(queries, items, target, scale=SCALE)
    expected = ops.catalogue_cross_entropy(queries.to(dtype), items.to(dtype), target, scale=SCALE)
    assert loss.dtype == torch.float32
    got, wanted = (torch.autograd.grad(value, (queries, items)) for value in (loss, expected))
    torch.testing.assert_close((loss, *got), (expected, *wanted), rtol=0, atol=0)
    assert got[0].dtype == torch.float32


def test_memory_never_holds_all_scores() -> None:
    """Neither one allocation nor all that are alive at a time have the [R, N] scores' size, saved tensors least."""
    num_rows, num_items, width = 1024, 20_000, 4
    queries, items = vectors(num_rows, width, dtype=torch.float32), vectors(num_items, width, dtype=torch.float32)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda x: x),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records,
    ):
        ops.catalogue_cross_entropy(queries, items, torch.arange(num_rows)).backward()
    sizes = [event.nbytes() for event in records.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(sizes))  # freed memory is negative
    assert peak > 4 * 32 * num_items, "allocations were not seen"
    assert peak < 4 * num_rows * num_items / 3
    assert sum(saved) <= 4 * width * (num_rows + num_items) + 8 * num_rows


def test_wrong_arguments_are_named() -> None:
    queries, items, target = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, -1])
    cases = [
        ((queries[0], items, target), {}, "queries of shape [R, D], got [4] float32"),
        ((queries, items[:, :3], target), {}, "items [N, 4] with N at least 1 for queries [3, 4] float32, got [5, 3]"),
        ((queries, items[:0], target), {}, "items [N, 4] with N at least 1 for queries [3, 4] float32, got [0, 4]"),
        ((queries, items, target.int()), {}, "target as int64, got [3] int32"),
        ((queries, items, target[:2]), {}, "target [3], got [2] int64"),
        ((queries, items, target), {"excluded": torch.zeros(5)}, "excluded [5] bool, got [5] float32"),
        ((queries, items, target), {"excluded": torch.zeros(4, dtype=torch.bool)}, "excluded [5] bool, got [4] bool"),
        ((queries, items.bfloat16(), target), {}, "queries and items of one dtype, got torch.float32 and torch.bf"),
        ((queries, items, target + 1), {}, "target in 0..4 or -1, got 5"),
        ((queries, items, target), {"ignore_index": -2}, "target in 0..4 or -2, got -1"),
        ((queries, items, target), {"excluded": torch.arange(5) > 3}, "target that is not excluded, got 4"),
        ((queries, items, target.to("meta")), {}, "one device, got queries on cpu, items on cpu, target on meta"),
    ]
    for arguments, named, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            ops.catalogue_cross_entropy(*arguments, **named)
        assert str(caught.value).startswith("ops.catalogue_cross_entropy expected ")


def test_plain_torch_agrees() -> None:
    queries, items = vectors(200, 8, dtype=torch.float32), vectors(333, 8, seed=1, dtype=torch.float32)
    target = torch.arange(200)
    loss = ops.catalogue_cross_entropy(queries, items, target, scale=SCALE)
    expected = F.cross_entropy(F.linear(queries, items) * SCALE, target)
    got, wanted = (torch.autograd.grad(value, (queries, items)) for value in (loss, expected))
    torch.testing.assert_close((loss, *got), (expected, *wanted))
