import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.ranker import Ranker, check_ranking
from modules.dense.vector_ranker import SequenceRanker
from modules.sequential.sasrec import SASRec, SASRecConfig
from tests.modules.tiny_liger import HISTORIES, ROWS, assert_ranked_by

NUM_ITEMS = 30


def model_of(seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SASRec(SASRecConfig(num_items=NUM_ITEMS, d_model=8, max_history=5, **sizes))


@torch.no_grad()
def brute_force(model, histories=HISTORIES):
    """[B, N] fp64."""
    return model.eval().queries(histories).double() @ model.item_vectors().double().T


def test_is_a_ranker_of_its_model():
    ranker = SequenceRanker(model_of(), batch_size=3)
    assert isinstance(ranker, Ranker)
    assert (ranker.name, ranker.max_history, ranker.batch_size) == ("sasrec", 5, 3)


@settings(max_examples=15, deadline=None)
@given(
    only=st.lists(st.booleans(), min_size=4, max_size=4),
    flags=st.booleans(),
    batch_size=st.integers(1, 5),
    k=st.integers(1, 35),
    seed=st.integers(0, 2**20),
)
def test_lists_are_those_of_brute_force(only, flags, batch_size, k, seed):
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    sets = [torch.randint(NUM_ITEMS, (size,), generator=generator).tolist() for size in (0, 5, 60, 9)]
    allowed = ItemFilter.from_lists(sets, only, torch.rand(NUM_ITEMS, generator=generator) < 0.6 if flags else None)
    item_ids, scores = SequenceRanker(model, batch_size=batch_size).rank(HISTORIES, k, allowed)
    check_ranking("sasrec", item_ids, scores, num_rows=4, k=k, num_items=NUM_ITEMS)
    assert_ranked_by(brute_force(model), item_ids, scores, allowed.flags(NUM_ITEMS), k)


def test_a_row_does_not_depend_on_its_batch():
    ranker = SequenceRanker(model_of())
    item_ids, scores = ranker.rank(HISTORIES, 10)
    for row, history in enumerate(ROWS):
        alone, alone_scores = ranker.rank(SeqBatch.from_lists([history]), 10)
        torch.testing.assert_close(alone_scores[0], scores[row])
        assert torch.equal(alone[0], item_ids[row])


def test_an_empty_history_lists_the_first_items_and_no_histories_nothing():
    ranker = SequenceRanker(model_of())
    item_ids, scores = ranker.rank(SeqBatch.from_lists([[]]), 3)
    assert (item_ids.tolist(), scores.tolist()) == ([[0, 1, 2]], [[0.0, 0.0, 0.0]])
    assert ranker.rank(SeqBatch.from_lists([]), 3)[0].shape == (0, 3)


def test_only_the_last_items_are_read():
    ranker = SequenceRanker(model_of(), max_history=2)
    long, short = SeqBatch.from_lists([[9, 1, 2], [5, 3, 4, 5]]), SeqBatch.from_lists([[1, 2], [4, 5]])
    for one, other in zip(ranker.rank(long, 10), ranker.rank(short, 10), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_the_moment_in_evaluation_mode():
    model = model_of()
    ranker = SequenceRanker(model)
    before = ranker.rank(HISTORIES, 10)
    model.train()
    assert torch.equal(ranker.rank(HISTORIES, 10)[1], before[1])
    assert model.training
    with torch.no_grad():
        model.items.neg_()
    item_ids, scores = ranker.rank(HISTORIES, 10)
    assert not torch.equal(item_ids, before[0])
    everything = torch.ones(4, NUM_ITEMS, dtype=torch.bool)
    assert_ranked_by(brute_force(model), item_ids, scores, everything, 10)


def test_bad_input_is_refused():
    model = model_of()
    with pytest.raises(InputError, match="max_history of at most 5, which the model was trained with, got 6"):
        SequenceRanker(model, max_history=6)
    with pytest.raises(InputError, match="SequenceRanker expected batch_size of at least 1, got 0"):
        SequenceRanker(model, batch_size=0)
    with pytest.raises(ValueError, match=r"filter of 4 rows and.* got 3 rows"):
        SequenceRanker(model).rank(HISTORIES, 3, ItemFilter.from_lists([[]] * 3))
    with torch.no_grad():
        model.items.fill_(torch.nan)
    with pytest.raises(InputError, match="ranker 'sasrec' gave NaN scores"):
        SequenceRanker(model).rank(HISTORIES, 3)
