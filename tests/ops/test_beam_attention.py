import pytest
import torch

import ops
from tests.ops.attention_twin import row_attention

GENERATOR = torch.Generator().manual_seed(0)


def test_self_attention_follows_each_beams_ancestors() -> None:
    widths, num_rows = [1, 3, 2], 2
    keys = [torch.randn(num_rows, width, 2, 4, generator=GENERATOR) for width in widths]
    values = [torch.randn(num_rows, width, 2, 4, generator=GENERATOR) for width in widths]
    q = torch.randn(num_rows, 2, 2, 4, generator=GENERATOR)
    bias = torch.randn(2, 3, generator=GENERATOR)
    ancestors = torch.tensor([[[0, 2, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 1]]])
    got = ops.beam_self_attention(q, keys, values, ancestors, scale=0.5, bias=bias)
    for row in range(num_rows):
        for beam in range(2):
            slots = ancestors[row, beam].tolist()
            k = torch.stack([cache[row, slot] for cache, slot in zip(keys, slots, strict=True)])
            v = torch.stack([cache[row, slot] for cache, slot in zip(values, slots, strict=True)])
            scores = torch.einsum("hd,khd->hk", q[row, beam], k) * 0.5 + bias
            torch.testing.assert_close(got[row, beam], torch.einsum("hk,khd->hd", scores.softmax(-1), v))


def gathered_attention(q, keys, values, ancestors, scale, bias):
    """The twin: all ancestors' keys and values side by side, then one softmax over the steps."""
    rows = torch.arange(len(q))[:, None]
    k, v = (
        torch.stack([entry[rows, ancestors[:, :, step]] for step, entry in enumerate(cache)], dim=2)
        for cache in (keys, values)
    )
    scores = torch.einsum("bwhd,bwshd->bwhs", q, k) * scale + bias
    return torch.einsum("bwhs,bwshd->bwhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("num_rows", "num_beams"), [(3, 1), (1, 63), (5, 20), (0, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_self_attention_equals_the_gathering_twin(
    num_rows: int, num_beams: int, dtype: torch.dtype, tolerance: float
) -> None:
    widths = [1, 7, num_beams]
    # As the model makes them: views of one product of queries, keys and values.
    fused = [torch.randn(num_rows, width, 3, 2, 4, generator=GENERATOR, dtype=torch.float64) for width in widths]
    q, bias = fused[-1][:, :, 0], torch.randn(2, 3, generator=GENERATOR, dtype=torch.float64)
    keys, values = [step[:, :, 1] for step in fused], [step[:, :, 2] for step in fused]
    ancestors = torch.stack(
        [torch.randint(width, (num_rows, num_beams), generator=GENERATOR) for width in widths], dim=2
    )
    expected = gathered_attention(q, keys, values, ancestors, 0.5, bias)
    got = ops.beam_self_attention(
        q.to(dtype),
        [k.to(dtype) for k in keys],
        [v.to(dtype) for v in values],
        ancestors,
        scale=0.5,
        bias=bias.to(dtype),
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_cross_attention_reads_each_beams_own_row() -> None:
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q = torch.randn(3, 5, 2, 4, generator=GENERATOR)
    kv = torch.randn(8, 2, 2, 4, generator=GENERATOR)
    got = ops.beam_cross_attention(q, kv, offsets, max_k=5, scale=0.5)
    for row, (begin, end) in enumerate([(0, 3), (3, 3), (3, 8)]):
        own = kv[begin:end]
        torch.testing.assert_close(got[row], row_attention(q[row], own[:, 0], own[:, 1], 0.5, None, 1, causal=False))
    assert got[1].abs().max() == 0


def test_wrong_ancestors_are_named() -> None:
    cache = [torch.zeros(1, 1, 2, 4)]
    with pytest.raises(ValueError, match=r"expected ancestors \[1, 2, 1\] for 1 cached keys, got \[1, 2, 2\]"):
        ops.beam_self_attention(
            torch.zeros(1, 2, 2, 4), cache, cache, torch.zeros(1, 2, 2, dtype=torch.int64), scale=1.0
        )
