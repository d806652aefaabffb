from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from ops.cpu import jagged_attention as implementation
from ops.cpu.plans import PlanMemo
from ops.reference.jagged_attention import jagged_attention as reference
from ops.reference.relative_buckets import position_buckets
from tests.ops.attention_twin import t5_bucket, twin_attention

MANY_LENGTHS = [*range(40), 3, 3, 64]
"""More distinct lengths than exact groups, so that rows are padded together."""


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


LENGTHS = [[5, 0, 1, 63, 5], [0], [1], [0, 0], MANY_LENGTHS]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_self_attention_equals_the_row_by_row_twin(lengths: list[int], causal: bool) -> None:
    offsets, num_tokens = offsets_of(lengths), sum(lengths)
    qkv, table = random(num_tokens, 3, 2, 4), random(8, 2, seed=1)
    arguments = {"scale": 0.5, "bias_table": table, "max_distance": 20, "causal": causal}
    got = ops.jagged_self_attention(qkv, offsets, max_len=max(lengths), **arguments)
    expected = twin_attention(qkv[:, 0], qkv[:, 1:], offsets, offsets, 0.5, table, 20, causal=causal)
    torch.testing.assert_close(got, expected)
    weights = random(*got.shape, seed=2)
    got_gradients = torch.autograd.grad((got * weights).sum(), [qkv, table])
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [qkv, table], allow_unused=True)
    for tensor, got_gradient, expected_gradient in zip([qkv, table], got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(
            got_gradient, torch.zeros_like(tensor) if expected_gradient is None else expected_gradient
        )


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([4, 4, 4], [0, 7, 63]),
        ([3, 0, 2, 1], [2, 5, 0, 1]),
        ([0, 0], [2, 3]),
        ([2, 3], [0, 0]),
        ([2] * 43, MANY_LENGTHS),
    ],
    ids=str,
)
def test_cross_attention_equals_the_row_by_row_twin(lengths_q: list[int], lengths_k: list[int]) -> None:
    offsets_q, offsets_k = offsets_of(lengths_q), offsets_of(lengths_k)
    q, kv = random(sum(lengths_q), 2, 4), random(sum(lengths_k), 2, 2, 4, seed=1)
    got = ops.jagged_attention(q, kv, offsets_q, offsets_k, max_q=max(lengths_q), max_k=max(lengths_k), scale=0.5)
    expected = twin_attention(q, kv, offsets_q, offsets_k, 0.5)
    torch.testing.assert_close(got, expected)
    weights = random(*got.shape, seed=2)
    got_gradients = torch.autograd.grad((got * weights).sum(), [q, kv])
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [q, kv], allow_unused=True)
    for tensor, got_gradient, expected_gradient in zip([q, kv], got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(
            got_gradient, torch.zeros_like(tensor) if expected_gradient is None else expected_gradient
        )


@pytest.mark.parametrize("lengths", [[3, 0, 2], list(range(34))], ids=["exact groups", "padded groups"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(lengths: list[int], dropout_p: float) -> None:
    lengths = lengths[-6:] if dropout_p else lengths[:12]
    offsets = offsets_of(lengths)
    qkv, table = random(sum(lengths), 3, 1, 2), random(4, 1, seed=1)

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ops.jagged_self_attention(
            qkv, offsets, max_len=max(lengths), scale=0.7, bias_table=table, max_distance=9, dropout_p=dropout_p
        )

    assert torch.autograd.gradcheck(attend, (qkv, table), fast_mode=True)


def test_offsets_that_change_in_place_are_noticed() -> None:
    offsets, qkv = offsets_of([4, 2]), random(6, 3, 2, 4)
    first = ops.jagged_self_attention(qkv, offsets, max_len=5, scale=0.5)
    offsets[1] = 1
    second = ops.jagged_self_attention(qkv, offsets, max_len=5, scale=0.5)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, twin_attention(qkv[:, 0], qkv[:, 1:], offsets, offsets, 0.5))


def test_offsets_that_change_behind_the_version_counter_are_noticed() -> None:
    buffer, qkv = np.array([0, 4, 6], dtype=np.int32), random(6, 3, 2, 4)
    offsets = torch.from_numpy(buffer)
    ops.jagged_self_attention(qkv, offsets, max_len=5, scale=0.5)
    buffer[1] = 1
    got = ops.jagged_self_attention(qkv, offsets, max_len=5, scale=0.5)
    torch.testing.assert_close(got, twin_attention(qkv[:, 0], qkv[:, 1:], offsets, offsets, 0.5))


def test_plans_are_shared_by_equal_offsets_and_by_nothing_else() -> None:
    offsets, qkv = offsets_of([4, 2]), random(6, 3, 2, 4)
    memo, layout = PlanMemo(implementation._plan), implementation._Layout(6, 6, 3, 3, 2, False)
    plan = memo(offsets, offsets, layout)
    assert memo(offsets.clone(), offsets.clone(), layout) is plan
    with torch.inference_mode():
        assert memo(offsets.clone(), offsets.clone(), layout) is plan
    assert memo(offsets, offsets, replace(layout, causal=True)) is not plan
    assert memo(offsets_of([2, 4]), offsets, layout) is not plan
    for causal in (True, False, True):
        got = ops.jagged_self_attention(qkv, offsets, max_len=4, scale=0.5, causal=causal)
        expected = twin_attention(qkv[:, 0], qkv[:, 1:], offsets, offsets, 0.5, causal=causal)
        torch.testing.assert_close(got, expected)


def test_a_plan_made_for_inference_serves_training() -> None:
    lengths = [*range(34), 3, 17]  # padded groups, with masks
    qkv = random(sum(lengths), 3, 2, 4)
    arguments = {"max_len": 33, "scale": 0.5, "causal": True}
    with torch.inference_mode():
        ops.jagged_self_attention(qkv, offsets_of(lengths), **arguments)
    got = ops.jagged_self_attention(qkv, offsets_of(lengths), **arguments)
    expected = twin_attention(qkv[:, 0], qkv[:, 1:], offsets_of(lengths), offsets_of(lengths), 0.5, causal=True)
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), qkv), torch.autograd.grad(expected.square().sum(), qkv), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_plan_that_another_thread_makes_during_a_look_up_does_no_harm() -> None:
    memo = PlanMemo(implementation._plan)
    offsets, layout = offsets_of([4, 2]), implementation._Layout(6, 6, 3, 3, 2, False)

    class Interrupted(implementation._Layout):
        """Whose comparison, in the middle of a look-up, is the moment at which the other thread runs."""

        __hash__ = None

        def __eq__(self, other: object) -> bool:
            for first in range(4):
                memo(offsets_of([first, 6 - first]), offsets, layout)
            return False

    memo(offsets, offsets, layout)
    plan = memo(offsets, offsets, Interrupted(6, 6, 3, 3, 2, False))
    assert len(plan.groups) == 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tokens_behind_the_last_row_get_zeros(backend: str) -> None:
    offsets_q, offsets_k = offsets_of([2, 0, 3]), offsets_of([4, 1, 2])
    twin = reference if backend == "reference" else implementation.jagged_attention

    def attend(q: Tensor | None, kv: Tensor, offsets_q: Tensor, offsets_k: Tensor) -> Tensor:
        return twin(q, kv, offsets_q, offsets_k, 3, 4, 0.5, None, 128, False, 0.0)

    q, kv = random(8, 2, 4), random(9, 2, 2, 4, seed=1)
    out = attend(q, kv, offsets_q, offsets_k)
    torch.testing.assert_close(out[:5], twin_attention(q[:5], kv[:7], offsets_q, offsets_k, 0.5))
    grad_q, grad_kv = torch.autograd.grad(out.square().sum() + out.sum(), [q, kv])
    assert not torch.cat([out[5:].flatten(), grad_q[5:].flatten(), grad_kv[7:].flatten()]).any()
    assert grad_q[:5].any()
    qkv = random(9, 3, 2, 4)
    out = attend(None, qkv, offsets_k, offsets_k)
    (grad,) = torch.autograd.grad(out.sum() + out.square().sum(), qkv)
    assert not torch.cat([out[7:].flatten(), grad[7:].flatten()]).any()
    assert grad[:7].any()


def test_keys_and_values_may_be_one_layer_of_several() -> None:
    offsets_q, offsets_k = offsets_of([2, 1]), offsets_of([3, 4])
    q, layers = random(3, 2, 4), random(7, 3, 2, 2, 4, seed=1)
    shape = {"max_q": 2, "max_k": 4, "scale": 0.5}
    got = [ops.jagged_attention(q, kv, offsets_q, offsets_k, **shape) for kv in layers.unbind(1)]
    expected = [twin_attention(q, kv, offsets_q, offsets_k, 0.5) for kv in layers.unbind(1)]
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(torch.stack(got).square().sum(), layers)
    torch.testing.assert_close(grad, torch.autograd.grad(torch.stack(expected).square().sum(), layers)[0])


@pytest.mark.parametrize("case", ["self", "causal", "cross", "dropout"])
def test_gradcheck_of_the_reference(case: str) -> None:
    offsets, offsets_k = offsets_of([3, 0, 1, 2]), offsets_of([2, 3, 1, 0])
    table = random(4, 2, seed=2)
    shape = (3, 3, 0.7, table, 9, case == "causal", 0.4 if case == "dropout" else 0.0, torch.tensor([7]))
    if case == "cross":
        q, kv = random(7, 2, 2), random(7, 2, 2, 2, seed=1)
        assert torch.autograd.gradcheck(
            lambda q, kv, table: reference(q, kv, offsets, offsets_k, *shape[:3], table, *shape[4:]), (q, kv, table)
        )
    else:
        assert torch.autograd.gradcheck(
            lambda qkv, table: reference(None, qkv, offsets, offsets, *shape[:3], table, *shape[4:]),
            (random(7, 3, 2, 2), table),
        )


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_no_rows(num_tokens: int) -> None:
    qkv = random(num_tokens, 3, 2, 4)
    table = random(8, 2)
    for seed in (None, torch.tensor([3])):
        out = ops.jagged_self_attention(
            qkv, offsets_of([]), max_len=0, scale=0.5, bias_table=table, dropout_p=0.5, seed=seed
        )
        torch.testing.assert_close(out, torch.zeros(num_tokens, 2, 4, dtype=torch.float64))


def test_a_compiler_sees_one_graph() -> None:
    offsets, qkv, table = offsets_of([3, 0, 4]), random(7, 3, 2, 4), random(8, 2, seed=1)

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        return ops.jagged_self_attention(qkv, offsets, max_len=4, scale=0.5, bias_table=table, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, got = attend(qkv, table), compiled(qkv, table)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), [qkv, table]),
        torch.autograd.grad(expected.square().sum(), [qkv, table]),
    )


def test_dropout_drops_probabilities_and_keeps_their_mean() -> None:
    lengths = [64] * 8
    offsets = offsets_of(lengths)
    qkv = torch.zeros(512, 3, 2, 4)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = ops.jagged_self_attention(qkv, offsets, max_len=64, scale=1.0, dropout_p=0.25)
    kept = out[:, :, 0] * 64 * 0.75
    torch.testing.assert_close(kept, kept.round())
    assert abs(kept.mean().item() / 48 - 1) < 0.02


def test_bf16_is_close_to_fp32() -> None:
    offsets = offsets_of([7, 3])
    qkv = random(10, 3, 2, 8, dtype=torch.float32)
    exact = ops.jagged_self_attention(qkv, offsets, max_len=7, scale=0.3)
    rough = ops.jagged_self_attention(qkv.bfloat16(), offsets, max_len=7, scale=0.3)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.jagged_self_attention(qkv, offsets, max_len=7, scale=0.3), rough)


def test_non_contiguous_inputs_and_stride_0_gradients() -> None:
    offsets = offsets_of([3, 4])
    wide = random(7, 3, 2, 8)
    qkv = wide[..., ::2]
    got = ops.jagged_self_attention(qkv, offsets, max_len=4, scale=0.5)
    torch.testing.assert_close(
        got, ops.jagged_self_attention(qkv.contiguous(), offsets, max_len=4, scale=0.5), rtol=0, atol=0
    )
    (gradient,) = torch.autograd.grad(got.sum(), wide)
    expected = twin_attention(qkv[:, 0], qkv[:, 1:], offsets, offsets, 0.5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), wide)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_equal_scalar_arithmetic(causal: bool) -> None:
    got = ops.relative_buckets(150, 140, 32, 128, causal)
    expected = [[t5_bucket(j - i, 32, 128, causal=causal) for j in range(140)] for i in range(150)]
    assert (got == torch.tensor(expected)).float().mean() == 1.0


def test_two_sided_buckets_by_hand() -> None:
    # 8 buckets: 4 a side, distances 0 and 1 exact, then growing up to 16.
    assert ops.relative_buckets(1, 20, 8, 16, False)[0].tolist() == [0, 5, *[6] * 4, *[7] * 14]


def test_buckets_made_for_inference_serve_training() -> None:
    with torch.inference_mode():
        ops.relative_buckets(3, 5, 8, 33, False)
    table = random(8, 2)
    table[ops.relative_buckets(3, 5, 8, 33, False)].sum().backward()
    assert ops.relative_buckets(0, 5, 8, 33, False).shape == (0, 5)


def test_buckets_on_another_device_are_copied_there_once() -> None:
    meta, sizes = torch.device("meta"), (3, 5, 8, 33, False)
    assert ops.relative_buckets(*sizes, meta).device == meta
    assert position_buckets(*sizes, meta) is position_buckets(*sizes, meta)


def test_wrong_arguments_are_named() -> None:
    offsets = offsets_of([2, 1])
    qkv = torch.zeros(3, 3, 2, 4)
    with pytest.raises(ValueError, match=r"expected qkv \[T, 3, H, D\], got \[3, 2, 2, 4\]"):
        ops.jagged_self_attention(qkv[:, :2], offsets, max_len=2, scale=1.0)
    with pytest.raises(ValueError, match="rising from 0 to at most the 3 packed tokens, got first 0, last 4"):
        ops.jagged_self_attention(qkv, offsets_of([4]), max_len=4, scale=1.0)
    with pytest.raises(ValueError, match="smallest step -1"):
        ops.jagged_self_attention(qkv, torch.tensor([0, 2, 1, 3], dtype=torch.int32), max_len=2, scale=1.0)
    with pytest.raises(ValueError, match="contiguous int32"):
        ops.jagged_self_attention(qkv, offsets.long(), max_len=2, scale=1.0)
    with pytest.raises(ValueError, match=r"longest row \(2\), got 1"):
        ops.jagged_self_attention(qkv, offsets, max_len=1, scale=1.0)
    with pytest.raises(ValueError, match=r"bias_table \[num_buckets, 2\]"):
        ops.jagged_self_attention(qkv, offsets, max_len=2, scale=1.0, bias_table=torch.zeros(8, 3))
    for causal, num_exact in [(True, 4), (False, 2)]:
        table = {"bias_table": torch.zeros(8, 2), "causal": causal}
        with pytest.raises(ValueError, match=f"max_distance above {num_exact}, .* got 8 buckets and {num_exact}"):
            ops.jagged_self_attention(qkv, offsets, max_len=2, scale=1.0, max_distance=num_exact, **table)
    with pytest.raises(ValueError, match=r"at least 4 buckets .* got 3 buckets"):
        ops.jagged_attention(
            qkv[:, 0], qkv[:, 1:], offsets, offsets, max_q=2, max_k=2, scale=1.0, bias_table=torch.zeros(3, 2)
        )
    with pytest.raises(ValueError, match=r"dropout_p in \[0, 1\), got 1.0"):
        ops.jagged_self_attention(qkv, offsets, max_len=2, scale=1.0, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"floating-point heads, got \[3, 3, 2, 4\] int64"):
        ops.jagged_self_attention(qkv.long(), offsets, max_len=2, scale=1.0)
    with pytest.raises(ValueError, match="tensors on one device, got qkv on cpu, offsets on cpu, bias_table on meta"):
        ops.jagged_self_attention(qkv, offsets, max_len=2, scale=1.0, bias_table=torch.zeros(8, 2, device="meta"))
    with pytest.raises(ValueError, match="of one dtype"):
        ops.jagged_attention(
            torch.zeros(3, 2, 4, dtype=torch.float16), qkv[:, 1:], offsets, offsets, max_q=2, max_k=2, scale=1.0
        )
    with pytest.raises(ValueError, match="as many rows of q as of kv, got 1 and 2"):
        ops.jagged_attention(qkv[:, 0], qkv[:, 1:], offsets_of([3]), offsets, max_q=3, max_k=2, scale=1.0)
