import pytest
import torch

import ops
from ops.reference import beam_attention as reference
from ops.triton import beam_attention as twin
from tests.kernels.harness import DTYPES, TOLERANCES, offsets_of, randn

LENGTHS = (5, 0, 1, 70)


def assert_close(got, expected, dtype):
    relative, absolute = TOLERANCES[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), expected, rtol=relative, atol=absolute)


def cross_case(num_beams, lengths=LENGTHS, num_heads=2, head_dim=8, tail=3):
    q = randn(len(lengths), num_beams, num_heads, head_dim)
    return q, randn(sum(lengths) + tail, 2, num_heads, head_dim, seed=1), offsets_of(lengths), max(lengths)


def check(device, dtype, num_beams=3, **options):
    q, kv, offsets, max_k = cross_case(num_beams, **options)
    q, kv = q.to(dtype), kv.to(dtype)
    got = ops.beam_cross_attention(q.to(device), kv.to(device), offsets.to(device), max_k=max_k, scale=0.3)
    assert_close(got, reference.beam_cross_attention(q.double(), kv.double(), offsets, max_k, 0.3), dtype)


def self_case(num_beams, num_steps=3, num_rows=3, num_heads=2, head_dim=8, spare_steps=1, spare_slots=2):
    """A cache that is NaN wherever it must not be read; step 0 has one beam."""
    widths = [1, *[num_beams] * (num_steps - 1)]
    cache = torch.full((num_steps + spare_steps, num_rows, num_beams + spare_slots, 2, num_heads, head_dim), torch.nan)
    for step, width in enumerate(widths):
        cache[step, :, :width] = randn(num_rows, width, 2, num_heads, head_dim, seed=step)
    generator = torch.Generator().manual_seed(7)
    ancestors = [torch.randint(width, (num_rows, num_beams), generator=generator) for width in widths]
    q = randn(num_rows, num_beams, num_heads, head_dim, seed=9)
    return q, cache, torch.stack(ancestors, 2), randn(num_heads, num_steps, seed=8)


def check_self(device, dtype, num_beams=3, *, biased=True, **options):
    q, cache, ancestors, bias = self_case(num_beams, **options)
    q, cache, bias = q.to(dtype), cache.to(dtype), bias if biased else None
    got = ops.beam_self_attention(
        q.to(device), cache.to(device), ancestors.to(device), scale=0.3, bias=None if bias is None else bias.to(device)
    )
    exact_bias = None if bias is None else bias.double()
    assert_close(got, reference.beam_self_attention(q.double(), cache.double(), ancestors, 0.3, exact_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_beams", [1, 3, 20])
def test_cross_parity(device, dtype, num_beams):
    check(device, dtype, num_beams)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_beams", [1, 3, 20])
def test_self_parity(device, dtype, num_beams):
    check_self(device, dtype, num_beams)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 1), (3, 20), (1, 128)])
def test_widths_of_heads(device, num_heads, head_dim):
    check(device, torch.float32, num_heads=num_heads, head_dim=head_dim)
    check_self(device, torch.float32, num_heads=num_heads, head_dim=head_dim)


def test_more_beams_than_a_program_takes(device):
    check(device, torch.float32, 65, lengths=(2, 0), num_heads=1)
    check_self(device, torch.float32, 65, num_rows=1, num_heads=1, head_dim=64)


@pytest.mark.parametrize("lengths", [(0, 0), (1,), (200, 3)], ids=str)
def test_lengths_of_rows(device, lengths):
    check(device, torch.float32, 2, lengths=lengths)


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_numbers_of_steps(device, num_steps):
    check_self(device, torch.float32, num_steps=num_steps, spare_steps=0)
    check_self(device, torch.float32, num_steps=num_steps, biased=False)


def test_no_rows(device):
    q = torch.zeros(0, 3, 2, 8, device=device)
    kv, ancestors = torch.zeros(0, 2, 2, 8, device=device), torch.zeros(0, 3, 1, dtype=torch.int64, device=device)
    assert ops.beam_cross_attention(q, kv, offsets_of((), device), max_k=0, scale=1.0).shape == q.shape
    cache = torch.zeros(1, 0, 3, 2, 2, 8, device=device)
    assert ops.beam_self_attention(q, cache, ancestors, scale=1.0).shape == q.shape


@pytest.mark.parametrize("layers_first", [False, True])
def test_views_as_the_decoder_makes_them(device, layers_first):
    """Queries out of a product with keys and values; keys and values of one layer out of several."""
    q, kv, offsets, max_k = cross_case(3)
    layers = randn(*((4, *kv.shape) if layers_first else (len(kv), 4, *kv.shape[1:])), seed=5).to(device)
    view = layers[2] if layers_first else layers[:, 2]
    product = randn(len(q), 3, 3, *q.shape[2:], seed=6).to(device)
    arguments = {"max_k": max_k, "scale": 0.3}
    got = ops.beam_cross_attention(product[:, :, 0], view, offsets.to(device), **arguments)
    dense = ops.beam_cross_attention(product[:, :, 0].contiguous(), view.contiguous(), offsets.to(device), **arguments)
    torch.testing.assert_close(got, dense, rtol=0, atol=0)

    _, cache, ancestors, bias = (tensor.to(device) for tensor in self_case(3, num_rows=len(q)))
    cache = torch.stack([cache, cache + 1.0], dim=1)[:, 1]
    table = torch.zeros(2, 10, device=device)
    table[:, 4:7] = bias
    got = ops.beam_self_attention(product[:, :, 0], cache, ancestors, scale=0.3, bias=table.flip(0).flip(0)[:, 4:7])
    dense = ops.beam_self_attention(
        product[:, :, 0].contiguous(), cache.contiguous(), ancestors.mT.contiguous().mT, scale=0.3, bias=bias
    )
    torch.testing.assert_close(got, dense, rtol=0, atol=0)


def test_transposed_heads_are_copied(device):
    q, kv, offsets, max_k = cross_case(3)
    transposed = kv.to(device).mT.contiguous().mT
    got = ops.beam_cross_attention(q.to(device), transposed, offsets.to(device), max_k=max_k, scale=0.3)
    expected = ops.beam_cross_attention(q.to(device), kv.to(device), offsets.to(device), max_k=max_k, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_opcheck(device):
    q, kv, offsets, max_k = (x.to(device) if isinstance(x, torch.Tensor) else x for x in cross_case(3))
    torch.library.opcheck(twin.BEAM_CROSS_ATTENTION_FORWARD, (q, kv, offsets, max_k, 0.3))
    q, cache, ancestors, bias = (tensor.to(device) for tensor in self_case(3, spare_steps=0, spare_slots=0))
    cache = cache.nan_to_num()
    for optional in (bias, None):
        torch.library.opcheck(twin.BEAM_SELF_ATTENTION_FORWARD, (q, cache, ancestors, optional, 0.3))


def test_compiles_as_one_graph(device):
    q, kv, offsets, max_k = (x.to(device) if isinstance(x, torch.Tensor) else x for x in cross_case(3))
    own_q, cache, ancestors, bias = (tensor.to(device) for tensor in self_case(3))

    def both(q, own_q):
        cross = ops.beam_cross_attention(q, kv, offsets, max_k=max_k, scale=0.3)
        return cross, ops.beam_self_attention(own_q, cache, ancestors, scale=0.3, bias=bias)

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(q, own_q)
    for one, other in zip(got, both(q, own_q), strict=True):
        torch.testing.assert_close(one, other)
