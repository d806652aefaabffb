from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.ranker import Ranker, check_ranking
from modules.dense.hybrid import HybridRanker
from modules.dense.ranker import DenseRanker
from modules.generation.ranker import GenerativeRanker
from tests.item_filters import filter_of
from tests.modules.tiny_liger import (
    HISTORIES,
    NUM_FEATURES,
    ROWS,
    assert_ranked_by,
    cosines,
    item_table,
    liger_model,
    liger_parts,
    tokenizer_of,
)

NUM_ITEMS = 40


def hybrid_of(model, tokenizer, items, num_beams=4, beam_width=6, **settings_):
    generative = GenerativeRanker(model, tokenizer, items, beam_width=beam_width, **settings_)
    return HybridRanker(generative, tokenizer, num_beams=num_beams)


def candidates_of(model, tokenizer, items, num_beams, allowed=None, histories=HISTORIES):
    """[B, N] bool: the first beams, and the cold items that are available and that the row may get."""
    generative = GenerativeRanker(model, tokenizer, items, beam_width=6)
    found = generative.rank(histories, num_beams, allowed)[0]
    beams = torch.zeros(len(histories), len(items) + 1, dtype=torch.bool)
    beams.scatter_(1, found.where(found >= 0, len(items)), True)
    cold = items.cold.expand(len(histories), -1)
    if tokenizer.available is not None:
        cold = cold & tokenizer.available
    if allowed is not None:
        cold = cold & allowed.flags(len(items))
    return beams[:, :-1] | cold


def test_names_and_settings():
    model, tokenizer, items = liger_parts()
    dense = DenseRanker(model, tokenizer, items)
    hybrid = hybrid_of(model, tokenizer, items, batch_size=3, max_history=7)
    assert isinstance(dense, Ranker)
    assert isinstance(hybrid, Ranker)
    assert (dense.name, dense.max_history, dense.batch_size) == ("dense", 20, 256)
    assert (hybrid.name, hybrid.max_history, hybrid.batch_size, hybrid.beam_width) == ("hybrid@4", 7, 3, 6)


@st.composite
def requests(draw):
    """Flags of cold and available items, and a filter."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    cold = torch.rand(NUM_ITEMS, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    available = torch.rand(NUM_ITEMS, generator=generator) < 0.8
    sets = [torch.randint(NUM_ITEMS, (size,), generator=generator).tolist() for size in (0, 2, 60, 9)]
    only = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    flags = torch.rand(NUM_ITEMS, generator=generator) < draw(st.sampled_from([0.1, 0.7]))
    allowed = ItemFilter.from_lists(sets, only, draw(st.sampled_from([None, flags])))
    return cold, draw(st.sampled_from([None, available])), draw(st.sampled_from([None, allowed]))


@settings(max_examples=15, deadline=None)
@given(
    request=requests(),
    num_beams=st.integers(1, 6),
    k=st.integers(1, 45),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_lists_are_those_of_brute_force(request, num_beams, k, batch_size, seed):
    cold, available, allowed = request
    model, tokenizer, items = liger_parts(seed=seed, cold=cold, available=available)
    scores = cosines(model, tokenizer, items)
    permitted = torch.ones(4, NUM_ITEMS, dtype=torch.bool) if available is None else available.expand(4, -1)
    permitted = permitted if allowed is None else permitted & allowed.flags(NUM_ITEMS)

    item_ids, found = DenseRanker(model, tokenizer, items, batch_size=batch_size).rank(HISTORIES, k, allowed)
    check_ranking("dense", item_ids, found, num_rows=4, k=k, num_items=NUM_ITEMS)
    assert_ranked_by(scores, item_ids, found, permitted, k)

    hybrid = hybrid_of(model, tokenizer, items, num_beams, batch_size=batch_size)
    item_ids, found = hybrid.rank(HISTORIES, k, allowed)
    check_ranking("hybrid", item_ids, found, num_rows=4, k=k, num_items=NUM_ITEMS)
    candidates = candidates_of(model, tokenizer, items, num_beams, allowed)
    assert not (candidates & ~permitted).any()
    assert_ranked_by(scores, item_ids, found, candidates, k)


def test_a_cold_item_that_a_beam_finds_is_listed_once():
    model, tokenizer, items = liger_parts()
    first = GenerativeRanker(model, tokenizer, items).rank(HISTORIES, 4)[0][0].tolist()
    cold = torch.zeros(NUM_ITEMS, dtype=torch.bool)
    cold[[first[0], first[2], 9]] = True
    item_ids, _ = hybrid_of(model, tokenizer, replace(items, cold=cold)).rank(HISTORIES, 10)
    listed = item_ids[0][item_ids[0] >= 0].tolist()
    assert sorted(listed) == sorted({*first, 9})


def test_equal_vectors_are_listed_by_item_id():
    """Cold items and beams alike: items without features share one vector."""
    model, tokenizer, items = liger_parts()
    items = replace(items, missing=torch.ones(NUM_ITEMS, dtype=torch.bool))
    for row in hybrid_of(model, tokenizer, items).rank(HISTORIES, 10)[0].tolist():
        assert row == sorted(row)
    assert DenseRanker(model, tokenizer, items).rank(HISTORIES, 5)[0].tolist() == [[0, 1, 2, 3, 4]] * 4


def test_all_cold_is_dense_and_no_cold_is_beams_in_another_order():
    model, tokenizer, items = liger_parts(cold=torch.ones(NUM_ITEMS, dtype=torch.bool))
    dense = DenseRanker(model, tokenizer, items).rank(HISTORIES, 10)
    for one, other in zip(hybrid_of(model, tokenizer, items).rank(HISTORIES, 10), dense, strict=True):
        assert torch.equal(one, other)
    warm = replace(items, cold=torch.zeros(NUM_ITEMS, dtype=torch.bool))
    beams = GenerativeRanker(model, tokenizer, warm, beam_width=6).rank(HISTORIES, 4)[0]
    assert torch.equal(hybrid_of(model, tokenizer, warm).rank(HISTORIES, 4)[0].sort().values, beams.sort().values)


def test_a_filter_of_few_items_leaves_short_lists():
    model, tokenizer, items = liger_parts()
    flags = torch.zeros(4, NUM_ITEMS, dtype=torch.bool)
    flags[0, [5, 3]] = flags[1, 5] = flags[2, [1, 2, 3]] = True  # only 5 is cold; no item for the last row
    item_ids, _ = hybrid_of(model, tokenizer, items).rank(HISTORIES, 4, filter_of(flags, 4))
    assert [sorted(row) for row in item_ids.tolist()] == [[-1, -1, 3, 5], [-1, -1, -1, 5], [-1, 1, 2, 3], [-1] * 4]


def test_a_row_does_not_depend_on_its_batch():
    model, tokenizer, items = liger_parts()
    for ranker in (DenseRanker(model, tokenizer, items), hybrid_of(model, tokenizer, items)):
        item_ids, scores = ranker.rank(HISTORIES, 8)
        for row, history in enumerate(ROWS):
            alone, alone_scores = ranker.rank(SeqBatch.from_lists([history]), 8)
            torch.testing.assert_close(alone_scores[0], scores[row])
            assert torch.equal(alone[0], item_ids[row])
        assert torch.equal(ranker.rank(HISTORIES, 8)[1], scores)
        assert ranker.rank(SeqBatch.from_lists([]), 3)[0].shape == (0, 3)


def test_only_the_last_items_are_read():
    model, tokenizer, items = liger_parts()
    long, short = SeqBatch.from_lists([[9, 1, 2], [5, 3, 4, 5]]), SeqBatch.from_lists([[1, 2], [4, 5]])
    for ranker in (
        DenseRanker(model, tokenizer, items, max_history=2),
        hybrid_of(model, tokenizer, items, max_history=2),
    ):
        for one, other in zip(ranker.rank(long, 10), ranker.rank(short, 10), strict=True):
            torch.testing.assert_close(one, other)


def trained_further(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.project_items(item_table()).square().mean().backward()
    optimizer.step()
    model.eval()


def best_weights_loaded(model):
    model.load_state_dict(liger_model(seed=3).state_dict())


@pytest.mark.parametrize("change", [trained_further, best_weights_loaded])
def test_a_ranker_from_before_training_ranks_as_a_new_one(change):
    model, tokenizer, items = liger_parts()
    rankers = [DenseRanker(model, tokenizer, items), hybrid_of(model, tokenizer, items)]
    before = [ranker.rank(HISTORIES, 10) for ranker in rankers]
    change(model)
    fresh = [DenseRanker(model, tokenizer, items), hybrid_of(model, tokenizer, items)]
    for old, new, lists in zip(rankers, fresh, before, strict=True):
        got, expected = old.rank(HISTORIES, 10), new.rank(HISTORIES, 10)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert not torch.equal(got[1], lists[1])


def test_the_catalogue_is_projected_once_for_all_batches():
    model, tokenizer, items = liger_parts()
    hybrid = hybrid_of(model, tokenizer, items, batch_size=1)
    with mock.patch.object(model, "project_items", wraps=model.project_items) as calls:
        for _ in range(3):
            hybrid.rank(HISTORIES, 5)
    assert calls.call_count == 1


def test_added_removed_and_returned_items():
    model, tokenizer, items = liger_parts()
    everything = torch.ones(4, NUM_ITEMS + 3, dtype=torch.bool)
    grown = items.with_rows(torch.tensor([40, 41, 42]), torch.randn(3, NUM_FEATURES))
    gone = torch.arange(NUM_ITEMS + 3) % 8 != 1
    returned = grown.with_rows(torch.tensor([1, 41]), torch.randn(2, NUM_FEATURES))
    dense, hybrid = DenseRanker(model, tokenizer, items), hybrid_of(model, tokenizer, items)
    dense.rank(HISTORIES, 5)
    hybrid.rank(HISTORIES, 5)
    for table, available in ((grown, None), (None, gone), (returned, None)):
        tokenizer = tokenizer_of(NUM_ITEMS + 3, available=available)
        current = grown if table is None else table
        permitted = everything if available is None else everything & available
        scores = cosines(model, tokenizer, current)
        dense.refresh(tokenizer, table)
        assert_ranked_by(scores, *dense.rank(HISTORIES, 43), permitted, 43)
        hybrid.refresh(tokenizer, table)
        candidates = candidates_of(model, tokenizer, current, 4)
        assert available is not None or candidates[:, 40:].all()  # new items are candidates at once
        assert_ranked_by(scores, *hybrid.rank(HISTORIES, 20), candidates, 20)


def test_a_refused_refresh_changes_nothing():
    model, tokenizer, items = liger_parts()
    rankers = [DenseRanker(model, tokenizer, items), hybrid_of(model, tokenizer, items)]
    before = [ranker.rank(HISTORIES, 10) for ranker in rankers]
    grown = items.with_rows(torch.tensor([40]), torch.randn(1, NUM_FEATURES))
    narrow = replace(items, features=items.features[:, :4])
    for ranker, lists in zip(rankers, before, strict=True):
        with pytest.raises(InputError, match=r"features of all 41 items .* got 40 rows"):
            ranker.refresh(tokenizer_of(41))
        with pytest.raises(InputError, match=r"features of all 40 items .* got 41 rows"):
            ranker.refresh(tokenizer, grown)
        with pytest.raises(InputError, match="features of width 6, got 4"):
            ranker.refresh(tokenizer, narrow)
        for one, other in zip(ranker.rank(HISTORIES, 10), lists, strict=True):
            assert torch.equal(one, other)


def test_what_does_not_fit_is_refused():
    model, tokenizer, items = liger_parts()
    with pytest.raises(InputError, match=r"takes the first 7 of only 6 beams\. Give --beam-width 7"):
        hybrid_of(model, tokenizer, items, num_beams=7)
    with pytest.raises(InputError, match="num_beams of at least 1, got 0"):
        hybrid_of(model, tokenizer, items, num_beams=0)
    with pytest.raises(InputError, match="reads item features, got no items"):
        DenseRanker(model, tokenizer, None)
    with pytest.raises(InputError, match="reads item features, got no items"):
        GenerativeRanker(model, tokenizer)
    tiger = liger_model(items=None, embedding_loss_weight=0.0)
    with pytest.raises(InputError, match="dense retrieval needs a model with a dense head"):
        DenseRanker(tiger, tokenizer, None)
    with pytest.raises(InputError, match="hybrid@4 retrieval needs a model with a dense head"):
        hybrid_of(tiger, tokenizer, None)
    with pytest.raises(InputError, match="reads no item features"):
        GenerativeRanker(tiger, tokenizer, items)
    with pytest.raises(InputError, match="need a model with a decoder"):
        GenerativeRanker(liger_model(sid_loss_weight=0.0), tokenizer, items)
