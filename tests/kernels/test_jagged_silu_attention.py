import pytest
import torch

import ops
from ops.reference.jagged_silu_attention import jagged_silu_attention as reference
from ops.triton import attention_tiles
from tests.kernels.harness import DTYPES, compare, offsets_of, randn
from tests.kernels.recompiles import num_graphs

NUM_HEADS = 2
LENGTHS = (5, 0, 1, 23)
TAIL = 3


def check(device, dtype, *, lengths=LENGTHS, width=16, value_width=24, bias=True, tail=TAIL, slack=0):
    """Every output and gradient; heads are parts of one wider tensor, as a fused product makes them."""
    offsets, max_len, num_tokens = offsets_of(lengths), max(lengths, default=0) + slack, sum(lengths) + tail
    widths = (width, width, value_width)
    inputs = {"fused": randn(num_tokens, NUM_HEADS * sum(widths))}
    table = {"table": randn(max_len + 2, NUM_HEADS, seed=2)} if bias else {}

    def parts(fused):
        split = fused.split([NUM_HEADS * part for part in widths], dim=1)
        return [part.unflatten(1, (NUM_HEADS, -1)) for part in split]

    def kernel(fused, table=None):
        return ops.jagged_silu_attention(
            *parts(fused), offsets.to(device), max_len=max_len, scale=0.3, normalizer=5.0, bias=table
        )

    def exact(fused, table=None):
        return reference(*parts(fused), offsets, max_len, 0.3, 5.0, table)

    compare(kernel, exact, inputs | table, dtype=dtype, device=device, keep_dtype=("table",))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "MAX_BLOCK", 16)


def arguments(device, lengths=(4, 0, 3), width=16):
    """q, k, v, offsets and bias for calls without a comparison."""
    q, k, v = (randn(sum(lengths) + TAIL, NUM_HEADS, width, seed=seed).to(device) for seed in range(3))
    bias = randn(max(lengths), NUM_HEADS, seed=5).to(device)
    return *(x.requires_grad_() for x in (q, k, v)), offsets_of(lengths, device), bias.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_silu_attention(device, dtype, bias):
    check(device, dtype, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_tile(device, dtype, small_tiles):
    check(device, dtype, lengths=(33, 0, 16))


@pytest.mark.parametrize(("width", "value_width"), [(1, 16), (24, 5), (64, 100)])
def test_widths_of_heads(device, width, value_width):
    check(device, torch.float32, lengths=(5, 17), width=width, value_width=value_width)


def test_rows_of_one_token(device):
    check(device, torch.float32, lengths=(1, 1, 1), tail=0)


def test_the_longest_length_may_be_generous(device):
    check(device, torch.float32, lengths=(5, 2), slack=40)


def test_bias_gradient_over_many_slots(device, monkeypatch):
    monkeypatch.setattr(attention_tiles, "ROWS_PER_SLOT", 1)
    check(device, torch.float32, lengths=(1, *[0] * 15, 2))


def test_bias_gradient_with_little_memory(device, monkeypatch, small_tiles):
    monkeypatch.setattr(attention_tiles, "MAX_PARTIALS", 1)
    check(device, torch.float32, lengths=(17, 3, 20))


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
@pytest.mark.parametrize("tail", [0, 5])
def test_no_tokens(device, lengths, tail):
    q, k, v = (randn(tail, NUM_HEADS, 16).to(device).requires_grad_() for _ in range(3))
    bias = randn(4, NUM_HEADS).to(device).requires_grad_()
    options = {"max_len": 0, "scale": 0.3, "normalizer": 2.0, "bias": bias}
    out = ops.jagged_silu_attention(q, k, v, offsets_of(lengths, device), **options)
    for value in (out, *torch.autograd.grad(out.sum() + out.square().sum(), [q, k, v, bias])):
        torch.testing.assert_close(value, torch.zeros_like(value))


def test_holes_in_inputs_and_stride_0_gradients(device):
    offsets = offsets_of((3, 4), device)
    wide = [randn(7, NUM_HEADS, 32, seed=seed).to(device).requires_grad_() for seed in range(3)]
    dense = [x.detach()[..., ::2].contiguous().requires_grad_() for x in wide]
    options = {"max_len": 4, "scale": 0.5, "normalizer": 2.0}
    got = ops.jagged_silu_attention(*(x[..., ::2] for x in wide), offsets, **options)
    expected = ops.jagged_silu_attention(*dense, offsets, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    gradients, exact = torch.autograd.grad(got.sum(), wide), torch.autograd.grad(expected.sum(), dense)
    torch.testing.assert_close([gradient[..., ::2] for gradient in gradients], list(exact), rtol=0, atol=0)


def test_two_runs_give_the_same_bits(device, small_tiles):
    q, k, v, offsets, bias = arguments(device, (20, 3))
    runs = []
    for _ in range(2):
        out = ops.jagged_silu_attention(q, k, v, offsets, max_len=20, scale=0.5, normalizer=4.0, bias=bias)
        runs.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, bias])))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_gradients_that_nobody_needs_are_not_returned(device):
    q, k, v, offsets, bias = arguments(device)
    options = {"max_len": 4, "scale": 0.5, "normalizer": 4.0}
    ops.jagged_silu_attention(q, k.detach(), v.detach(), offsets, bias=bias.detach(), **options).sum().backward()
    assert q.grad is not None
    assert k.grad is v.grad is bias.grad is None


def test_bias_tables_of_another_dtype(device):
    q, k, v, offsets, bias = arguments(device)
    narrow = bias.detach().bfloat16().requires_grad_()
    exact = narrow.detach().float().requires_grad_()
    options = {"max_len": 4, "scale": 0.5, "normalizer": 4.0}
    outs = [ops.jagged_silu_attention(q, k, v, offsets, bias=table, **options) for table in (narrow, exact)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    (got,), (expected,) = (
        torch.autograd.grad(out.square().sum(), table) for out, table in zip(outs, (narrow, exact), strict=True)
    )
    torch.testing.assert_close(got, expected.bfloat16(), rtol=0, atol=0)


def test_float64_and_wide_heads_go_to_the_reference(device, caplog):
    check(device, torch.float32, lengths=(4, 2), value_width=136)
    assert "runs in PyTorch for torch.float32 heads of width 136" in caplog.text
    q, k, v, offsets, bias = (x.double() if x.is_floating_point() else x for x in arguments(device))
    got = ops.jagged_silu_attention(q, k, v, offsets, max_len=4, scale=0.5, normalizer=4.0, bias=bias)
    torch.testing.assert_close(got, reference(q, k, v, offsets, 4, 0.5, 4.0, bias), rtol=0, atol=0)


def test_one_graph_serves_all_sizes(device):
    def attend(q, k, v, offsets, bias):
        return ops.jagged_silu_attention(q, k, v, offsets, max_len=8, scale=0.5, normalizer=4.0, bias=bias)

    calls = [arguments(device, lengths) for lengths in ((8, 0, 3), (2, 8), (8, 6, 1, 4))]
    assert num_graphs(attend, calls) == 1


def test_compiles_in_one_graph(device):
    q, k, v, offsets, bias = arguments(device)

    def attend(q, k, v, bias):
        return ops.jagged_silu_attention(q, k, v, offsets, max_len=4, scale=0.5, normalizer=4.0, bias=bias)

    compiled, inputs = torch.compile(attend, fullgraph=True, backend="aot_eager"), [q, k, v, bias]
    runs = [(out, *torch.autograd.grad(out.square().sum(), inputs)) for out in (compiled(*inputs), attend(*inputs))]
    torch.testing.assert_close(*runs)
