"""What must hold for any batch of rows: each row is as if it were alone, and the tail is as if it were not there."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from data.schemas import SeqBatch
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer
from tests.ops.attention_twin import row_attention

few = settings(
    max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
lengths_of_rows = st.lists(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 130]), max_size=5)
tails = st.sampled_from([0, 1, 70])

REFERENCE = torch.tensor([0])
"""A dropout seed, which asks for the reference where there is a twin for processors."""


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def rows_of(x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [x[begin:end] for begin, end in pairwise(offsets.tolist())]


def packed(rows: list[Tensor], like: Tensor) -> Tensor:
    """The rows and zeros behind them up to the length of `like`."""
    zeros = torch.zeros_like(like)
    return torch.cat([*rows, zeros[sum(map(len, rows)) :]])


def assert_same(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Values and gradients agree."""
    torch.testing.assert_close(got, expected)
    weights = random(*got.shape, seed=9).detach()
    none = sum(0.0 * value.sum() for value in inputs)  # without rows, no input takes part in the results
    ours, theirs = (
        torch.autograd.grad((result * weights).sum() + none, inputs, retain_graph=True) for result in (got, expected)
    )
    torch.testing.assert_close(ours, theirs)


@few
@given(lengths_of_rows, tails)
def test_padded_rows_are_the_rows(lengths: list[int], tail: int) -> None:
    offsets, x, max_len = offsets_of(lengths), random(sum(lengths) + tail, 2), max(lengths, default=0)
    padded = ops.jagged_to_padded(x, offsets, max_len=max_len, pad=7.0)
    for row, own in zip(padded, rows_of(x, offsets), strict=True):
        assert torch.equal(row, torch.cat([own, torch.full((max_len - len(own), 2), 7.0, dtype=x.dtype)]))
    assert_same(ops.padded_to_jagged(padded, offsets, num_tokens=len(x)), packed(rows_of(x, offsets), x), x)


@few
@given(st.data(), st.integers(0, 5), st.integers(2, 3))
def test_joined_rows_are_the_rows_behind_each_other(data: st.DataObject, num_rows: int, num_parts: int) -> None:
    lengths = [
        data.draw(st.lists(st.sampled_from([0, 1, 5, 64]), min_size=num_rows, max_size=num_rows))
        for _ in range(num_parts)
    ]
    offsets = [offsets_of(own) for own in lengths]
    parts = [random(sum(own) + data.draw(tails), 2, seed=seed) for seed, own in enumerate(lengths)]
    joined, bounds = ops.jagged_concat(parts, offsets)
    rows = [torch.cat(row) for row in zip(*map(rows_of, parts, offsets), strict=True)]
    assert_same(joined, packed(rows, joined), *parts)
    assert bounds.tolist() == offsets_of([sum(row) for row in zip(*lengths, strict=True)] or [0] * num_rows).tolist()
    for part, own, again in zip(
        parts, offsets, ops.jagged_split(joined, offsets, num_tokens=list(map(len, parts))), strict=True
    ):
        assert_same(again, packed(rows_of(part, own), part), part)


@few
@given(lengths_of_rows, tails)
def test_softmax_of_rows(lengths: list[int], tail: int) -> None:
    offsets, x, max_len = offsets_of(lengths), random(sum(lengths) + tail, 3), max(lengths, default=0)
    softmax = ops.jagged_softmax(x, offsets, max_len=max_len)
    total = ops.jagged_sum(softmax, offsets, max_len=max_len)
    torch.testing.assert_close(total, (offsets.diff() > 0).double()[:, None].expand(-1, 3))
    assert_same(softmax, packed([row.softmax(0) for row in rows_of(x, offsets)], x), x)


@few
@given(lengths_of_rows, tails)
def test_sums_and_means_of_rows(lengths: list[int], tail: int) -> None:
    offsets, x, max_len = offsets_of(lengths), random(sum(lengths) + tail, 2), max(lengths, default=0)
    sums = torch.stack([x[:0].sum(0), *(row.sum(0) for row in rows_of(x, offsets))])[1:]
    assert_same(ops.jagged_sum(x, offsets, max_len=max_len), sums, x)
    means = sums / torch.tensor(lengths).clamp(min=1)[:, None]
    assert_same(ops.jagged_mean(x, offsets, max_len=max_len), means, x)


@pytest.mark.parametrize("seed", [None, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@few
@given(lengths_of_rows, tails)
def test_self_attention_of_rows(seed: Tensor | None, causal: bool, lengths: list[int], tail: int) -> None:
    offsets, max_len = offsets_of(lengths), max(lengths, default=0)
    qkv = random(sum(lengths) + tail, 3, 2, 4)
    got = ops.jagged_self_attention(qkv, offsets, max_len=max_len, scale=0.5, causal=causal, seed=seed)
    rows = [row_attention(*row.unbind(1), 0.5, None, 128, causal=causal) for row in rows_of(qkv, offsets)]
    assert_same(got, packed(rows, got), qkv)


@pytest.mark.parametrize("seed", [None, REFERENCE], ids=["cpu", "reference"])
@few
@given(st.lists(st.tuples(st.sampled_from([0, 1, 4, 65]), st.sampled_from([0, 1, 63, 130])), max_size=4), tails, tails)
def test_cross_attention_of_rows(seed: Tensor | None, lengths: list[tuple[int, int]], tail_q: int, tail_k: int) -> None:
    of_queries, of_keys = [own for own, _ in lengths], [own for _, own in lengths]
    offsets_q, offsets_k = offsets_of(of_queries), offsets_of(of_keys)
    q, kv = random(sum(of_queries) + tail_q, 2, 4), random(sum(of_keys) + tail_k, 2, 2, 4, seed=1)
    got = ops.jagged_attention(
        q, kv, offsets_q, offsets_k,
        max_q=max(of_queries, default=0), max_k=max(of_keys, default=0), scale=0.5, seed=seed,
    )  # fmt: skip
    rows = [
        row_attention(own, *other.unbind(1), 0.5, None, 128, causal=False)
        for own, other in zip(rows_of(q, offsets_q), rows_of(kv, offsets_k), strict=True)
    ]
    assert_same(got, packed(rows, got), q, kv)


TABLE = random(8, 2, seed=3)


def attend(x: Tensor, offsets: Tensor, *, max_len: int, seed: Tensor | None = None) -> Tensor:
    return ops.jagged_self_attention(
        x, offsets, max_len=max_len, scale=0.5, bias_table=TABLE, max_distance=40, seed=seed
    )


TOKENWISE = {
    "softmax": (lambda x, offsets, max_len: ops.jagged_softmax(x[:, 0, 0], offsets, max_len=max_len)),
    "attention": (lambda x, offsets, max_len: attend(x, offsets, max_len=max_len)),
    "reference attention": (lambda x, offsets, max_len: attend(x, offsets, max_len=max_len, seed=REFERENCE)),
    "padded and back": (
        lambda x, offsets, max_len: ops.padded_to_jagged(
            ops.jagged_to_padded(x, offsets, max_len=max_len).square(), offsets, num_tokens=len(x)
        )
    ),
    "joined": (lambda x, offsets, max_len: ops.jagged_concat([x, x], [offsets, offsets])[0]),
}


@pytest.mark.parametrize("op", TOKENWISE.values(), ids=TOKENWISE)
@few
@given(lengths_of_rows.flatmap(lambda lengths: st.tuples(st.just(lengths), st.permutations(range(len(lengths))))))
def test_permuted_rows_give_permuted_results(op, drawn: tuple[list[int], list[int]]) -> None:
    lengths, order = drawn
    offsets, x, max_len = offsets_of(lengths), random(sum(lengths), 3, 2, 4), max(lengths, default=0)
    shuffled = packed([rows_of(x, offsets)[row] for row in order], x)
    shuffled_offsets = offsets_of([lengths[row] for row in order])
    result, got = op(x, offsets, max_len), op(shuffled, shuffled_offsets, max_len)
    times = len(result) // max(len(x), 1)
    rows = rows_of(result, offsets * times)
    assert_same(got, packed([rows[row] for row in order], got), x)


@pytest.mark.parametrize("op", TOKENWISE.values(), ids=TOKENWISE)
@few
@given(lengths_of_rows, st.integers(0, 3), tails)
def test_empty_rows_and_a_tail_change_nothing(op, lengths: list[int], num_empty: int, tail: int) -> None:
    offsets, x, max_len = offsets_of(lengths), random(sum(lengths) + tail, 3, 2, 4), max(lengths, default=0)
    longer = torch.cat([offsets, offsets[-1:].expand(num_empty)])
    result = op(x[: sum(lengths)], offsets, max_len)
    got = op(x, longer, max_len)
    assert_same(got, torch.cat([result, torch.zeros_like(got[len(result) :])]), x)


LEVEL_SIZES = (5, 4, 3)
NUM_ITEMS = 30


def small_model(num_user_buckets: int) -> tuple[EncoderDecoderRetrievalModel, SequenceTokenizer]:
    """In double precision and evaluation mode, with relative biases as after training."""
    torch.manual_seed(0)
    config = RetrievalModelConfig(
        languages={"text": LEVEL_SIZES},
        d_model=16,
        num_heads=2,
        head_dim=8,
        d_ff=32,
        num_encoder_layers=1,
        num_decoder_layers=2,
        num_user_buckets=num_user_buckets,
        relative_buckets=8,
        relative_max_distance=16,
        label_smoothing=0.1,
    )
    model = EncoderDecoderRetrievalModel(config)
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.bias.table)
    semantic_ids = torch.stack([torch.randint(size, (NUM_ITEMS,)) for size in LEVEL_SIZES], dim=1)
    return model.double().eval(), SequenceTokenizer(semantic_ids, model.vocabulary)


@pytest.mark.parametrize("num_user_buckets", [0, 4])
@settings(few, max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=22), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from([0, 1, 9]),
)
def test_a_batch_of_fixed_capacity_trains_as_the_batch_itself(
    num_user_buckets: int, histories: list[list[int]], num_empty: int, tail: int
) -> None:
    model, tokenize = small_model(num_user_buckets)
    batch = SeqBatch.from_lists(histories)
    batch = replace(batch, user_hashes=torch.arange(len(batch)), targets=torch.arange(len(batch)) * 3)
    filled = batch.to_capacity(num_rows=len(batch) + num_empty, num_items=len(batch.item_ids) + tail)
    losses, gradients = [], []
    for one in (batch, filled):
        losses.append(model(tokenize(one)))
        gradients.append(torch.autograd.grad(losses[-1]["loss"], list(model.parameters()), materialize_grads=True))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        expected = model.log_likelihood(tokenize(batch))
        got = model.log_likelihood(tokenize(filled))
    torch.testing.assert_close(got[: len(batch)], expected, rtol=1e-6, atol=1e-6)
