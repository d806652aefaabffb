import math
from functools import partial

import pytest
import torch

import ops
from ops.reference.cross_entropy_small_vocab import cross_entropy_small_vocab as reference
from ops.triton import cross_entropy_small_vocab as kernels
from tests.kernels.harness import DTYPES, compare, randn
from tests.kernels.recompiles import num_graphs

LEVELS = ((0, 40), (40, 47), (47, 100))


def targets(num_rows, slices, ignored=-1):
    """One in five rows is ignored."""
    sizes = torch.tensor([end - begin for begin, end in slices]).repeat(num_rows)[:num_rows]
    wanted = torch.randint(1 << 30, (num_rows,), generator=torch.Generator().manual_seed(1)) % sizes
    return torch.where(torch.arange(num_rows) % 5 == 3, ignored, wanted)


def check(device, dtype, logits=None, slices=LEVELS, label_smoothing=0.1):
    logits = randn(30, 100) * 2 if logits is None else logits
    target = targets(len(logits), slices)

    def kernel(logits):
        level_slice = slices if len(slices) > 1 else slices[0]
        return ops.cross_entropy_small_vocab(
            logits, target.to(device), ignore_index=-1, label_smoothing=label_smoothing, level_slice=level_slice
        )

    def exact(logits):
        return reference(logits, target, -1, label_smoothing, slices)

    compare(kernel, exact, {"logits": logits}, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_parity(device, dtype, label_smoothing):
    check(device, dtype, label_smoothing=label_smoothing)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 63), (64, 257)], ids=str)
def test_odd_sizes_of_one_level(device, shape):
    check(device, torch.float32, randn(*shape), ((0, shape[1]),))


def test_one_slice_of_the_columns(device):
    check(device, torch.float32, randn(7, 63), ((5, 30),))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_levels_wider_than_a_block(device, monkeypatch, label_smoothing):
    monkeypatch.setattr(kernels, "_MAX_BLOCK", 16)
    check(device, torch.float32, label_smoothing=label_smoothing)


def test_large_and_infinite_logits(device):
    logits = torch.tensor([[1e4, 1e4 - 1.0, -torch.inf], [-torch.inf, -1e4, -1e4]], device=device).requires_grad_()
    losses = ops.cross_entropy_small_vocab(logits, torch.tensor([1, 2], device=device))
    torch.testing.assert_close(losses.cpu(), torch.tensor([1.3132616, 0.6931472]))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[0.7310586, -0.7310586, 0.0], [0.0, 0.5, -0.5]]))


def test_a_wrong_target_on_a_device_gives_nan(device, monkeypatch):
    monkeypatch.setattr(ops.checks, "_reads_values", lambda tensor: False)
    target = torch.tensor([2, 3, -100, -5], device=device)
    losses = ops.cross_entropy_small_vocab(torch.zeros(4, 3, device=device), target)
    assert losses.isnan().tolist() == [False, True, False, True]


def test_gradients_of_unlikely_codes_in_fp16(device):
    """Between the two passes a gradient is not yet scaled by what fp16 training scales its loss with."""
    logits = torch.tensor([[0.0, -20.0, -20.0]]).to(device, torch.float16).requires_grad_()
    losses = ops.cross_entropy_small_vocab(logits, torch.zeros(1, dtype=torch.int64, device=device))
    (losses.sum() * 65536).backward()
    expected = torch.full((1, 2), 65536 * math.exp(-20.0))
    torch.testing.assert_close(logits.grad[:, 1:].float().cpu(), expected, rtol=1e-3, atol=0)


def test_gradients_with_holes_and_a_second_backward(device):
    logits = randn(6, 12).to(device).requires_grad_()
    losses = ops.cross_entropy_small_vocab(logits, torch.arange(6, device=device)).view(2, 3)
    (first,) = torch.autograd.grad(losses.mean(0).sum(), logits, retain_graph=True)
    (second,) = torch.autograd.grad(losses.mean(0).sum(), logits, retain_graph=True)
    expected = torch.nn.functional.softmax(logits.detach(), dim=1)
    expected -= torch.eye(12, device=device)[:6]
    torch.testing.assert_close(first, expected / 2)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_no_gradient_is_made_where_none_is_wanted(device, monkeypatch):
    seen = []
    forward = kernels.FORWARD
    monkeypatch.setattr(kernels, "FORWARD", lambda *arguments: seen.append(arguments[-1]) or forward(*arguments))
    logits, target = torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    ops.cross_entropy_small_vocab(logits, target)
    ops.cross_entropy_small_vocab(logits.requires_grad_(), target)
    with torch.no_grad():
        ops.cross_entropy_small_vocab(logits, target)
    assert seen == [False, True, False]


def test_library_rules(device):
    logits, target = randn(6, 12).to(device), torch.arange(6, device=device)
    torch.library.opcheck(kernels.FORWARD, (logits, target, [0, 12], -100, 0.1, True))
    torch.library.opcheck(kernels.FORWARD, (logits, target, [0, 6, 6, 12], -100, 0.0, False))
    torch.library.opcheck(kernels.BACKWARD, (torch.ones(6, device=device), logits))


def test_compiles_in_one_graph(device):
    logits, target = randn(6, 12).to(device).requires_grad_(), torch.zeros(6, dtype=torch.int64, device=device)
    op = partial(ops.cross_entropy_small_vocab, target=target, level_slice=((0, 4), (4, 12)))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(logits).sum(), logits)
    (expected,) = torch.autograd.grad(op(logits).sum(), logits)
    torch.testing.assert_close(got, expected)


def test_one_graph_for_any_number_of_rows(device):
    op = partial(ops.cross_entropy_small_vocab, level_slice=((0, 4), (4, 12)))
    inputs = (
        (randn(rows, 12).to(device).requires_grad_(), torch.zeros(rows, dtype=torch.int64, device=device))
        for rows in (6, 8, 10)
    )
    assert num_graphs(op, inputs) == 1
