import pytest
import torch

import ops
from ops.cpu import beam_attention as cpu
from ops.reference import beam_attention as reference
from tests.ops.attention_twin import row_attention

GENERATOR = torch.Generator().manual_seed(0)
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def self_case(num_rows: int, num_beams: int, widths: list[int]) -> tuple[torch.Tensor, ...]:
    """Queries, a cache that is NaN where it must not be read, ancestors and bias."""
    cache = torch.full((len(widths) + 1, num_rows, max(widths) + 1, 2, 2, 4), torch.nan, dtype=torch.float64)
    for step, width in enumerate(widths):
        cache[step, :, :width] = randn(num_rows, width, 2, 2, 4)
    ancestors = [torch.randint(width, (num_rows, num_beams), generator=GENERATOR) for width in widths]
    return randn(num_rows, num_beams, 2, 4), cache, torch.stack(ancestors, dim=2), randn(2, len(widths))


def test_self_attention_by_hand():
    """Two steps with equal keys: the probabilities are the softmax of the bias, 3/4 and 1/4."""
    cache = torch.ones(2, 1, 2, 2, 1, 1)
    cache[0, 0, 0, 1] = 8.0
    cache[1, 0, :, 1] = torch.tensor([4.0, -4.0]).view(2, 1, 1)
    ancestors = torch.tensor([[[0, 1], [0, 0]]])
    bias = torch.tensor([[3.0, 1.0]]).log()
    out = ops.beam_self_attention(torch.ones(1, 2, 1, 1), cache, ancestors, scale=1.0, bias=bias)
    torch.testing.assert_close(out.flatten(), torch.tensor([3 / 4 * 8 - 1 / 4 * 4, 3 / 4 * 8 + 1 / 4 * 4]))


@pytest.mark.parametrize("twin", [cpu.beam_self_attention, reference.beam_self_attention])
@pytest.mark.parametrize("biased", [False, True])
def test_self_attention_follows_each_beams_ancestors(twin, biased):
    q, cache, ancestors, bias = self_case(3, 5, [1, 3, 7])
    got = twin(q, cache, ancestors, 0.5, bias if biased else None)
    for row in range(3):
        for beam in range(5):
            own = torch.stack([cache[step, row, slot] for step, slot in enumerate(ancestors[row, beam].tolist())])
            scores = torch.einsum("hd,khd->hk", q[row, beam], own[:, 0]) * 0.5 + (bias if biased else 0.0)
            torch.testing.assert_close(got[row, beam], torch.einsum("hk,khd->hd", scores.softmax(-1), own[:, 1]))


@pytest.mark.parametrize(("num_rows", "num_beams"), [(3, 1), (1, 63), (5, 20), (0, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_self_attention_in_every_dtype(num_rows, num_beams, dtype, tolerance):
    q, cache, ancestors, bias = self_case(num_rows, num_beams, [1, 7, num_beams])
    expected = reference.beam_self_attention(q, cache, ancestors, 0.5, bias)
    # As the model makes them: queries out of a product with keys and values, one layer's cache out of several.
    q = torch.stack([q, q, q], dim=2).to(dtype)[:, :, 0]
    cache = torch.stack([cache, cache], dim=1).to(dtype)[:, 0]
    for twin in (cpu.beam_self_attention, reference.beam_self_attention):
        got = twin(q, cache, ancestors, 0.5, bias.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("twin", [cpu.beam_cross_attention, reference.beam_cross_attention])
def test_cross_attention_reads_each_beams_own_row(twin):
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, kv = randn(3, 5, 2, 4), randn(10, 2, 2, 4)  # two keys of no row
    got = twin(q, kv, offsets, 5, 0.5)
    for row, (begin, end) in enumerate([(0, 3), (3, 3), (3, 8)]):
        own = kv[begin:end]
        torch.testing.assert_close(got[row], row_attention(q[row], own[:, 0], own[:, 1], 0.5, None, 1, causal=False))
    assert got[1].abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("lengths", [[3, 0, 9], [0, 0, 0], [1, 1, 1]])
def test_cross_attention_of_one_layer_out_of_several(lengths, dtype, tolerance):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    q, layers = randn(3, 4, 2, 4), randn(sum(lengths), 3, 2, 2, 4)
    for kv in (layers[:, 1], layers.transpose(0, 1).contiguous()[1]):
        expected = reference.beam_cross_attention(q, kv, offsets, max(lengths), 0.5)
        got = ops.beam_cross_attention(q.to(dtype), kv.to(dtype), offsets, max_k=max(lengths), scale=0.5)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_compiles_as_one_graph():
    """The references, which a compiler gets, on both ops."""
    offsets = torch.tensor([0, 3, 3], dtype=torch.int32)
    q, cache, ancestors, bias = (tensor.nan_to_num() for tensor in self_case(2, 3, [1, 3]))
    kv = randn(4, 2, 2, 4)

    def both(q):
        cross = ops.beam_cross_attention(q, kv, offsets, max_k=3, scale=0.3)
        return cross, ops.beam_self_attention(q, cache, ancestors, scale=0.3, bias=bias)

    for one, other in zip(torch.compile(both, fullgraph=True, backend="eager")(q), both(q), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 4)}, r"q of shape \[B, W, H, D\], got \[1, 2, 4\]"),
        ({"cache": torch.zeros(2, 1, 2, 2, 2)}, r"cache of shape \[S, B, slots, 2, H, D\]"),
        ({"cache": torch.zeros(2, 1, 2, 2, 2, 3)}, r"cache \[S, 1, slots, 2, 2, 4\] of q's dtype .* got \[2, 1"),
        ({"cache": torch.zeros(2, 1, 2, 2, 2, 4).half()}, "of q's dtype .*float16"),
        ({"ancestors": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"ancestors \[1, 2, 1 to 2 steps\], got \[1, 2, 3\]"),
        ({"ancestors": torch.zeros(1, 2, 0, dtype=torch.int64)}, r"1 to 2 steps"),
        ({"ancestors": torch.zeros(1, 2, 1)}, "ancestors as int64"),
        ({"ancestors": torch.full((1, 2, 1), 2)}, r"ancestors in 0\.\.1, got 2"),
        ({"bias": torch.zeros(2, 2)}, r"bias \[2, 1\], got \[2, 2\]"),
    ],
)
def test_bad_self_attention_is_named(change, message):
    arguments = {
        "q": torch.zeros(1, 2, 2, 4),
        "cache": torch.zeros(2, 1, 2, 2, 2, 4),
        "ancestors": torch.zeros(1, 2, 1, dtype=torch.int64),
        "bias": torch.zeros(2, 1),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.beam_self_attention(**arguments, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 4)}, r"q of shape \[B, W, H, D\], got \[1, 2, 4\]"),
        ({"kv": torch.zeros(3, 2, 2, 3)}, r"kv \[T, 2, H, D\] of one dtype, got .* and \[3, 2, 2, 3\]"),
        ({"kv": torch.zeros(3, 2, 2, 4).half()}, "of one dtype"),
        ({"offsets_k": torch.tensor([0, 3])}, "offsets_k as contiguous int32"),
        ({"offsets_k": torch.tensor([0, 4], dtype=torch.int32)}, "at most the 3 packed tokens"),
        ({"offsets_k": torch.tensor([0, 1, 3], dtype=torch.int32)}, "the 1 rows of q, got 2 rows"),
        ({"max_k": 2}, r"max_k at least as long as the longest row \(3\), got 2"),
    ],
)
def test_bad_cross_attention_is_named(change, message):
    arguments = {
        "q": torch.zeros(1, 2, 2, 4),
        "kv": torch.zeros(3, 2, 2, 4),
        "offsets_k": torch.tensor([0, 3], dtype=torch.int32),
        "max_k": 3,
    } | change
    with pytest.raises(ValueError, match=message):
        ops.beam_cross_attention(**arguments, scale=1.0)
