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
