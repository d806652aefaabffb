import pytest
import torch

import ops
from ops.reference.jagged_attention import jagged_attention as reference
from ops.triton import attention_tiles
from ops.triton import jagged_attention as kernels
from tests.kernels.harness import DTYPES, compare, offsets_of, randn, seed_on

NUM_HEADS = 2
NUM_BUCKETS = 8
MAX_DISTANCE = 20
LENGTHS = (5, 0, 1, 23)
LENGTHS_K = (7, 3, 0, 30)
TAIL = 3


def check(device, dtype, **case):
    check_cross(device, dtype, **case)


def check_cross(
    device, dtype, *, dropout_p=0.3, lengths_q=LENGTHS, lengths_k=LENGTHS_K, width=16, bias=True, tail=TAIL, slack=0
):
    """Queries over keys of other rows, with a relative bias so that every gradient of the op is compared."""
    offsets = offsets_of(lengths_q), offsets_of(lengths_k)
    longest = max(lengths_q, default=0) + slack, max(lengths_k, default=0) + slack
    inputs = {
        "q": randn(sum(lengths_q) + tail, NUM_HEADS, width),
        "kv": randn(sum(lengths_k) + tail, 2, NUM_HEADS, width, seed=1),
    }
    table = {"table": randn(NUM_BUCKETS, NUM_HEADS, seed=2)} if bias else {}

    def kernel(q, kv, table=None):
        return ops.jagged_attention(
            q, kv, *(part.to(device) for part in offsets), max_q=longest[0], max_k=longest[1], scale=0.3,
            bias_table=table, max_distance=MAX_DISTANCE, dropout_p=dropout_p, seed=seed_on(device),
        )  # fmt: skip

    def exact(q, kv, table=None):
        return reference(q, kv, *offsets, *longest, 0.3, table, MAX_DISTANCE, False, dropout_p, seed_on("cpu"))

    compare(kernel, exact, inputs | table, dtype=dtype, device=device, keep_dtype=("table",))


def check_self(
    device, dtype, *, causal=False, dropout_p=0.3, lengths=LENGTHS, width=16, bias=True, buckets=NUM_BUCKETS,
    max_distance=MAX_DISTANCE, tail=TAIL, slack=0,
):  # fmt: skip
    """Rows over themselves."""
    offsets, max_len = offsets_of(lengths), max(lengths, default=0) + slack
    inputs = {"qkv": randn(sum(lengths) + tail, 3, NUM_HEADS, width)}
    table = {"table": randn(buckets, NUM_HEADS, seed=2)} if bias else {}

    def kernel(qkv, table=None):
        return ops.jagged_self_attention(
            qkv, offsets.to(device), max_len=max_len, scale=0.3, bias_table=table, max_distance=max_distance,
            causal=causal, dropout_p=dropout_p, seed=seed_on(device),
        )  # fmt: skip

    def exact(qkv, table=None):
        shape = (max_len, max_len, 0.3, table, max_distance, causal, dropout_p)
        return reference(None, qkv, offsets, offsets, *shape, seed_on("cpu"))

    compare(kernel, exact, inputs | table, dtype=dtype, device=device, keep_dtype=("table",))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "MAX_BLOCK", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(device, dtype, dropout_p, causal):
    check_self(device, dtype, dropout_p=dropout_p, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_cross_attention(device, dtype, dropout_p):
    check_cross(device, dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_longer_than_a_tile(device, dtype, causal, small_tiles):
    check_self(device, dtype, causal=causal, lengths=(33, 0, 16, 17))


@pytest.mark.parametrize("lengths_q", [(40, 3), (3, 40)], ids=str)
def test_more_queries_than_keys_and_fewer(device, lengths_q, small_tiles):
    check_cross(device, torch.float32, lengths_q=lengths_q, lengths_k=(20, 33))


def test_tiles_that_are_not_square(device):
    check_cross(device, torch.float32, lengths_q=(4, 4, 4), lengths_k=(0, 37, 5))


@pytest.mark.parametrize("causal", [False, True])
def test_without_bias(device, causal, small_tiles):
    check_self(device, torch.float32, causal=causal, lengths=(20, 5), bias=False)
    check_cross(device, torch.float32, lengths_q=(20, 5), lengths_k=(1, 18), bias=False)


def test_rows_of_one_token(device):
    check_self(device, torch.float32, lengths=(1, 1, 1), tail=0)
    check_cross(device, torch.float32, lengths_q=(1, 1, 1), lengths_k=(1, 1, 1), tail=0)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((), ()), ((0, 0), (3, 2)), ((3, 2), (0, 0)), ((0,), (0,))], ids=str
)
@pytest.mark.parametrize("tail", [0, 5])
def test_no_queries_or_no_keys(device, lengths_q, lengths_k, tail):
    q = randn(sum(lengths_q) + tail, NUM_HEADS, 16).to(device).requires_grad_()
    kv = randn(sum(lengths_k) + tail, 2, NUM_HEADS, 16).to(device).requires_grad_()
    table = randn(NUM_BUCKETS, NUM_HEADS).to(device).requires_grad_()
    out = ops.jagged_attention(
        q, kv, offsets_of(lengths_q, device), offsets_of(lengths_k, device), scale=0.3, bias_table=table,
        max_q=max(lengths_q, default=0), max_k=max(lengths_k, default=0), dropout_p=0.3,
    )  # fmt: skip
    for value in (out, *torch.autograd.grad(out.sum() + out.square().sum(), [q, kv, table])):
        torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("width", [1, 24, 100])
def test_widths_of_heads(device, width):
    check_self(device, torch.float32, lengths=(5, 17), width=width)
    check_cross(device, torch.float16, lengths_q=(5, 17), lengths_k=(18, 2), width=width)


def test_longest_lengths_may_be_generous(device):
    check_self(device, torch.float32, lengths=(5, 2), slack=40)
    check_cross(device, torch.float32, lengths_q=(5,), lengths_k=(2,), slack=20)


@pytest.mark.parametrize("causal", [False, True])
def test_distant_positions_share_the_buckets_of_the_reference(device, causal):
    check_self(
        device, torch.float16, causal=causal, dropout_p=0.0, lengths=(150,), buckets=32, max_distance=128, tail=0
    )


def test_bias_gradient_over_many_slots(device, monkeypatch):
    monkeypatch.setattr(attention_tiles, "ROWS_PER_SLOT", 1)
    check_self(device, torch.float32, lengths=(2, 1) * 9)


def test_bias_gradient_with_little_memory(device, monkeypatch, small_tiles):
    monkeypatch.setattr(attention_tiles, "MAX_PARTIALS", 1)
    check_self(device, torch.float32, lengths=(17, 3, 20, 1))


def test_bias_tables_of_another_dtype(device):
    offsets = offsets_of((4, 2), device)
    table = randn(NUM_BUCKETS, NUM_HEADS).to(device, torch.bfloat16).requires_grad_()
    qkv = randn(6, 3, NUM_HEADS, 16).to(device)
    arguments = {"max_len": 4, "scale": 0.3, "max_distance": MAX_DISTANCE}
    out = ops.jagged_self_attention(qkv, offsets, bias_table=table, **arguments)
    wide = table.detach().float().requires_grad_()
    expected = ops.jagged_self_attention(qkv, offsets, bias_table=wide, **arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (got,), (exact,) = (
        torch.autograd.grad(part.square().sum(), leaf) for part, leaf in [(out, table), (expected, wide)]
    )
    torch.testing.assert_close(got, exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_may_be_one_layer_of_several(device, dtype):
    offsets_q, offsets_k = offsets_of((4, 0, 4)), offsets_of((9, 2, 0))
    inputs = {"q": randn(8, NUM_HEADS, 24), "layers": randn(11 + TAIL, 3, 2, NUM_HEADS, 24, seed=1)}

    def kernel(q, layers):
        parts = offsets_q.to(device), offsets_k.to(device)
        return tuple(ops.jagged_attention(q, kv, *parts, max_q=4, max_k=9, scale=0.3) for kv in layers.unbind(1))

    def exact(q, layers):
        shape = (4, 9, 0.3, None, 128, False, 0.0)
        return tuple(reference(q, kv, offsets_q, offsets_k, *shape) for kv in layers.unbind(1))

    compare(kernel, exact, inputs, dtype=dtype, device=device)


def test_holes_in_inputs_and_gradients(device):
    offsets = offsets_of((3, 4), device)
    wide = randn(7, 3, NUM_HEADS, 32).to(device).requires_grad_()
    dense = wide.detach()[..., ::2].contiguous().requires_grad_()
    got = ops.jagged_self_attention(wide[..., ::2], offsets, max_len=4, scale=0.5)
    expected = ops.jagged_self_attention(dense, offsets, max_len=4, scale=0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    (got_grad,), (expected_grad,) = (
        torch.autograd.grad(*pair) for pair in [(got.sum(), wide), (expected.sum(), dense)]
    )
    torch.testing.assert_close(got_grad[..., ::2], expected_grad, rtol=0, atol=0)


def test_two_runs_give_the_same_bits(device, small_tiles):
    offsets = offsets_of((20, 3, 17), device)
    inputs = [randn(40, 3, NUM_HEADS, 16).to(device).requires_grad_(), randn(8, NUM_HEADS).to(device).requires_grad_()]
    runs = []
    for _ in range(2):
        out = ops.jagged_self_attention(
            inputs[0], offsets, max_len=20, scale=0.5, bias_table=inputs[1], dropout_p=0.3, seed=seed_on(device)
        )
        runs.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_every_call_drops_something_else(device):
    offsets, qkv = offsets_of((20,), device), randn(20, 3, NUM_HEADS, 16).to(device)
    torch.manual_seed(0)
    with ops.dropout_seeds(2, device):
        outs = [ops.jagged_self_attention(qkv, offsets, max_len=20, scale=0.5, dropout_p=0.5) for _ in range(3)]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


def test_gradients_that_nobody_needs_are_not_returned(device):
    offsets, table = offsets_of((3,), device), randn(8, NUM_HEADS).to(device)
    q = randn(3, NUM_HEADS, 16).to(device).requires_grad_()
    kv = randn(3, 2, NUM_HEADS, 16).to(device)
    ops.jagged_attention(q, kv, offsets, offsets, max_q=3, max_k=3, scale=0.3, bias_table=table).sum().backward()
    assert q.grad is not None
    assert kv.grad is None
    assert table.grad is None


def test_float64_goes_to_the_reference(device):
    offsets, qkv = offsets_of((4, 2), device), randn(6, 3, NUM_HEADS, 16).double().to(device)
    got = ops.jagged_self_attention(qkv, offsets, max_len=4, scale=0.3, dropout_p=0.3, seed=seed_on(device))
    expected = reference(None, qkv, offsets, offsets, 4, 4, 0.3, None, 128, False, 0.3, seed_on(device))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_wide_heads_go_to_the_reference(device, caplog):
    check_self(device, torch.float32, lengths=(4, 2), width=136)
    assert "runs in PyTorch for torch.float32 heads of width 136" in caplog.text


def test_library_rules(device):
    offsets, offsets_k = offsets_of((4, 0, 2), device), offsets_of((0, 5, 3), device)
    q, kv, qkv = (randn(*shape, NUM_HEADS, 16).to(device) for shape in [(6,), (8, 2), (6, 3)])
    table, seed = randn(NUM_BUCKETS, NUM_HEADS).to(device), seed_on(device)
    for queries, keys, rows, bias_table, causal, dropout_p in [
        (None, qkv, (offsets, offsets), table, True, 0.3),
        (q, kv, (offsets, offsets_k), None, False, 0.0),
    ]:
        given = (5, 5, 0.3, MAX_DISTANCE, causal, dropout_p)
        seed_given = seed if dropout_p else None
        torch.library.opcheck(kernels.FORWARD, (queries, keys, *rows, bias_table, seed_given, *given))
        out, lse, bias = kernels.FORWARD(queries, keys, *rows, bias_table, seed_given, *given)
        num_buckets = 0 if bias_table is None else NUM_BUCKETS
        torch.library.opcheck(
            kernels.BACKWARD,
            (torch.ones_like(out), queries, keys, out, lse, *rows, bias, seed_given, *given, num_buckets),
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_in_one_graph(device, dropout_p):
    offsets = offsets_of((4, 0, 3), device)
    inputs = [randn(9, 3, NUM_HEADS, 16).to(device).requires_grad_(), randn(8, NUM_HEADS).to(device).requires_grad_()]

    def attend(qkv, table):
        return ops.jagged_self_attention(
            qkv, offsets, max_len=4, scale=0.5, bias_table=table, dropout_p=dropout_p, seed=seed_on(device)
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    runs = [(out, *torch.autograd.grad(out.square().sum(), inputs)) for out in (compiled(*inputs), attend(*inputs))]
    torch.testing.assert_close(*runs)
