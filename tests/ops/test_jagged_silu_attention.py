from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops.cpu import jagged_silu_attention as implementation
from ops.reference.jagged_silu_attention import jagged_silu_attention as reference

TWINS = {"cpu": implementation.jagged_silu_attention, "reference": reference}
LENGTHS = [5, 0, 1, 33, 5, 20, 19, 2]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def heads(num_tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two heads; values are wider."""
    return tuple(random(num_tokens, 2, width, seed=seed, dtype=dtype) for seed, width in enumerate((4, 4, 6)))


def attend_by_hand(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, scale: float, normalizer: float
) -> Tensor:
    """Query by query, with the sigmoid spelled out; zeros behind the last row."""
    out = [[] for _ in range(len(q))]
    for begin, end in pairwise(offsets.tolist()):
        for query in range(begin, end):
            keys = torch.arange(begin, query + 1)
            scores = scale * (q[query] * k[keys]).sum(-1)
            if bias is not None:
                scores = scores + bias[query - keys]
            weights = scores / (1 + (-scores).exp())
            out[query] = (weights[..., None] * v[keys]).sum(0) / normalizer
    zeros = torch.zeros_like(v[0])
    return torch.stack([row if isinstance(row, Tensor) else zeros for row in out]) if out else torch.zeros_like(v)


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weights = random(*got.shape, seed=9).detach()
    none = sum(0.0 * value.sum() for value in inputs)  # without rows, no input takes part in the results
    ours, theirs = (
        torch.autograd.grad((out * weights).sum() + none, inputs, retain_graph=True) for out in (got, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_sums_by_hand(twin: str, with_bias: bool) -> None:
    q, k, v = heads(sum(LENGTHS) + 3)
    offsets, bias = offsets_of(LENGTHS), random(36, 2, seed=5) if with_bias else None
    got = TWINS[twin](q, k, v, offsets, 33, 0.4, 20.0, bias)
    expected = attend_by_hand(q, k, v, offsets, bias, 0.4, 20.0)
    torch.testing.assert_close(got, expected)
    assert not got[-3:].any()
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    assert_same_gradients(got, expected, inputs)
    gradients = torch.autograd.grad(TWINS[twin](q, k, v, offsets, 33, 0.4, 20.0, bias).square().sum(), inputs)
    assert not torch.cat([gradient[-3:].flatten() for gradient in gradients[:3]]).any()
    assert bias is None or not gradients[3][33:].any()


def test_a_row_of_two_by_hand() -> None:
    one = torch.ones(2, 1, 1)
    out = ops.jagged_silu_attention(
        one, one, torch.tensor([[[1.0]], [[10.0]]]), offsets_of([2]), max_len=2, scale=2.0, normalizer=4.0,
        bias=torch.tensor([[0.0], [1.0]]),
    )  # fmt: skip
    silu_2, silu_3 = 2 * torch.sigmoid(torch.tensor(2.0)), 3 * torch.sigmoid(torch.tensor(3.0))
    torch.testing.assert_close(out.flatten(), torch.stack([silu_2, 10 * silu_2 + silu_3]) / 4)


@settings(max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([0, 1, 2, 5, 17, 64, 65]), max_size=5), st.sampled_from([0, 1, 70]))
def test_processor_and_reference_agree_on_any_rows(lengths: list[int], tail: int) -> None:
    q, k, v = heads(sum(lengths) + tail)
    bias, longest = random(70, 2, seed=5), max(lengths, default=0)
    got, expected = (twin(q, k, v, offsets_of(lengths), longest, 0.4, 9.0, bias) for twin in TWINS.values())
    torch.testing.assert_close(got, expected)
    assert_same_gradients(got, expected, [q, k, v, bias])


@pytest.mark.parametrize("twin", TWINS)
def test_gradcheck(twin: str) -> None:
    offsets, bias = offsets_of([3, 0, 2, 5]), random(5, 2, seed=5)
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: TWINS[twin](q, k, v, offsets, 5, 0.7, 3.0, bias), (*heads(11), bias)
    )


def test_later_tokens_and_other_rows_change_nothing() -> None:
    q, k, v = heads(9, torch.float32)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[3:5] = 100.0  # the end of the first row
        x[7:] = -100.0  # the end of the second row
    offsets, bias = offsets_of([5, 4]), random(5, 2, seed=5, dtype=torch.float32)
    before, after = (
        ops.jagged_silu_attention(*x, offsets, max_len=5, scale=0.5, normalizer=5.0, bias=bias)
        for x in ((q, k, v), changed)
    )
    kept = torch.tensor([0, 1, 2, 5, 6])
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0)
    assert not torch.equal(after[[3, 4, 7, 8]], before[[3, 4, 7, 8]])


def test_parts_of_a_wider_tensor_and_stride_0_gradients() -> None:
    offsets, bias = offsets_of([3, 4]), random(4, 2, seed=5)
    fused = random(7, 2, 14)
    dense = fused.detach().clone().requires_grad_()
    parts = fused.split([4, 4, 6], dim=-1)
    copies = [part.contiguous() for part in dense.split([4, 4, 6], dim=-1)]
    outs = [
        ops.jagged_silu_attention(*x, offsets, max_len=4, scale=0.5, normalizer=5.0, bias=bias) for x in (parts, copies)
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out, x in zip(outs, (fused, dense), strict=True)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert gradients[0].any()


def test_bf16_is_close_to_fp32() -> None:
    offsets, bias = offsets_of([7, 3]), random(7, 2, seed=5, dtype=torch.float32)
    q, k, v = heads(10, torch.float32)
    options = {"max_len": 7, "scale": 0.3, "normalizer": 2.0, "bias": bias}
    exact = ops.jagged_silu_attention(q, k, v, offsets, **options)
    rough = ops.jagged_silu_attention(*(x.bfloat16() for x in (q, k, v)), offsets, **options)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.jagged_silu_attention(q, k, v, offsets, **options), rough)


def test_a_table_of_bf16_gets_the_gradient_of_its_values_in_fp32() -> None:
    offsets, (q, k, v) = offsets_of([7, 3]), heads(10, torch.float32)
    table = random(7, 2, seed=5, dtype=torch.float32).bfloat16().detach().requires_grad_()
    exact = table.detach().float().requires_grad_()
    for twin in TWINS.values():
        outs = [twin(q, k, v, offsets, 7, 0.3, 2.0, bias) for bias in (table, exact)]
        torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
        got, expected = (
            torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in zip(outs, (table, exact), strict=True)
        )
        torch.testing.assert_close(got, expected.bfloat16())


def test_offsets_that_change_in_place_are_noticed() -> None:
    offsets, (q, k, v) = offsets_of([4, 2]), heads(6)
    options = {"max_len": 5, "scale": 0.5, "normalizer": 2.0}
    first = ops.jagged_silu_attention(q, k, v, offsets, **options)
    offsets[1] = 1
    second = ops.jagged_silu_attention(q, k, v, offsets, **options)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, attend_by_hand(q, k, v, offsets, None, 0.5, 2.0))


def test_wrong_arguments_are_named() -> None:
    offsets, (q, k, v) = offsets_of([2, 1]), heads(3)
    options = {"max_len": 2, "scale": 1.0, "normalizer": 2.0}
    with pytest.raises(ValueError, match=r"q of shape \[T, H, D\], got \[3, 8\]"):
        ops.jagged_silu_attention(q.flatten(1), k, v, offsets, **options)
    with pytest.raises(ValueError, match=r"v \[T, H, Dv\] of one floating-point dtype, got .* \[2, 2, 6\] float64"):
        ops.jagged_silu_attention(q, k, v[:2], offsets, **options)
    with pytest.raises(ValueError, match="of one floating-point dtype"):
        ops.jagged_silu_attention(q, k, v.float(), offsets, **options)
    with pytest.raises(ValueError, match=r"bias \[at least 2 distances, 2 heads\], got \[1, 2\] float64"):
        ops.jagged_silu_attention(q, k, v, offsets, bias=random(1, 2), **options)
    with pytest.raises(ValueError, match=r"longest row \(2\), got 1"):
        ops.jagged_silu_attention(q, k, v, offsets, **(options | {"max_len": 1}))
    with pytest.raises(ValueError, match=r"positive normalizer, got 0\.0"):
        ops.jagged_silu_attention(q, k, v, offsets, **(options | {"normalizer": 0.0}))
    with pytest.raises(ValueError, match="rising from 0 to at most the 3 packed tokens"):
        ops.jagged_silu_attention(q, k, v, offsets_of([4]), **(options | {"max_len": 4}))
    with pytest.raises(ValueError, match=r"one device, got q on cpu.* bias on meta"):
        ops.jagged_silu_attention(q, k, v, offsets, bias=torch.zeros(2, 2, device="meta"), **options)
