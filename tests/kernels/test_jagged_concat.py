import pytest
import torch

import ops
from data.schemas import SeqBatch
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.vocabulary import CodeVocabulary
from ops.reference import jagged_concat as reference
from ops.triton import jagged_concat as twin
from tests.kernels.harness import DTYPES, compare, offsets_of, randn

FIRST, SECOND, THIRD = (3, 0, 1, 65, 0), (1, 1, 1, 1, 1), (0, 2, 0, 30, 0)


def check(device, dtype, lengths=(FIRST, SECOND, THIRD), width=(5, 2), tails=(4, 0, 2)):
    """Outputs and gradients of both directions."""
    offsets = [offsets_of(own) for own in lengths]
    here = [own.to(device) for own in offsets]
    num_tokens = [sum(own) + tail for own, tail in zip(lengths, tails, strict=False)]
    parts = {f"part{index}": randn(num_own, *width, seed=index) for index, num_own in enumerate(num_tokens)}
    compare(
        lambda **parts: ops.jagged_concat(list(parts.values()), here)[0],
        lambda **parts: reference.jagged_concat(list(parts.values()), offsets)[0],
        parts, dtype=dtype, device=device, tolerance=(0.0, 0.0),
    )  # fmt: skip
    compare(
        lambda x: ops.jagged_split(x, here, num_tokens=num_tokens),
        lambda x: reference.jagged_split(x, offsets, num_tokens),
        {"x": randn(sum(num_tokens), *width)}, dtype=dtype, device=device, tolerance=(0.0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(device, dtype):
    check(device, dtype)


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 130), (64, 63))], ids=str)
@pytest.mark.parametrize("tails", [(0, 0), (3, 5)], ids=str)
def test_lengths_of_rows(device, lengths, tails):
    check(device, torch.float32, lengths, (3,), tails)


@pytest.mark.parametrize("width", [(), (0,), (300,)], ids=str)
def test_widths(device, width):
    check(device, torch.float32, ((2, 0, 9), (1, 1, 1)), width)


def test_more_tokens_than_a_block(device):
    check(device, torch.float32, ((1500, 0, 1100), (1, 1, 900)), ())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_every_dtype_is_copied_bit_by_bit(device, dtype):
    parts = [(randn(own, 3, seed=own) * 100).to(torch.float64).to(dtype) for own in (12, 4)]
    offsets = [offsets_of((3, 0, 7)), offsets_of((1, 1, 1))]
    here = [own.to(device) for own in offsets]
    packed, bounds = ops.jagged_concat([part.to(device) for part in parts], here)
    expected, expected_bounds = reference.jagged_concat(parts, offsets)
    assert packed.dtype == dtype
    assert torch.equal(packed.cpu(), expected)
    assert bounds.dtype == torch.int32
    assert torch.equal(bounds.cpu(), expected_bounds)
    for got, own in zip(
        ops.jagged_split(packed, here, num_tokens=(12, 4)),
        reference.jagged_split(expected, offsets, (12, 4)),
        strict=True,
    ):
        assert torch.equal(got.cpu(), own)


def test_token_sequences(device):
    codes = torch.tensor([[0, 0], [1, 2], [3, 1]])
    tokenize = SequenceTokenizer(codes, CodeVocabulary({"text": (4, 3)}, num_user_buckets=10, separator=True))
    batch = SeqBatch.from_lists([[2, 1], [], [0]]).to_capacity(num_rows=4, num_items=6)
    tokenized = tokenize.to(device)(batch.to(device))
    # BOS 0, separator 1, level 0 from 2, level 1 from 6, users from 9, all of them unknown.
    assert tokenized.tokens.tolist() == [9, 5, 7, 1, 3, 8, 1, 9, 9, 2, 6, 1, 9, *[0] * 9]
    assert tokenized.offsets.tolist() == [0, 7, 8, 12, 13]


def test_opcheck(device):
    first, second, x = offsets_of(FIRST, device), offsets_of(SECOND, device), randn(80, 2).to(device)
    torch.library.opcheck(twin.FORWARD, (x[:71].clone(), x[71:].clone(), first, second, first + second))
    torch.library.opcheck(twin.BACKWARD, (x, first, second, first + second, 71))


def test_compiles_as_one_graph(device):
    offsets = offsets_of((3, 0, 1), device), offsets_of((1, 1, 1), device)
    x, y = randn(5, 2).to(device).requires_grad_(), randn(3, 2, seed=1).to(device).requires_grad_()

    def there_and_back(x, y):
        packed, _ = ops.jagged_concat((x, y), offsets)
        return torch.cat(ops.jagged_split(packed * packed, offsets, num_tokens=(5, 3)))

    got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x, y)
    expected = there_and_back(x, y)
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True
    ):
        torch.testing.assert_close(one, other)
