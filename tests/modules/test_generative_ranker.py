from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ops.graphs
from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.ranker import Ranker, check_ranking
from modules.generation.beam import beam_search
from modules.generation.ranker import GenerativeRanker, Query
from modules.generation.trie import PrefixTrie
from modules.ranking import last_items
from modules.tokenizer.sequence import SequenceTokenizer
from tests.item_filters import filter_of
from tests.modules.generation_fakes import all_log_likelihoods, random_semantic_ids
from tests.modules.tiny_artifact import FixedTokenizer, tiny_model
from tests.ops.recorders import TapeRecorder


def parts(level_sizes=(5, 6, 3), num_items=40, seed=0, **settings_):
    tokenizer = FixedTokenizer(random_semantic_ids(num_items, list(level_sizes), seed), tuple(level_sizes))
    model = tiny_model(level_sizes, seed=seed)
    return model, tokenizer, GenerativeRanker(model, tokenizer, **settings_)


def brute_force(model, tokenizer, histories):
    tokens = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary)(histories)
    return all_log_likelihoods(model.eval(), tokens, tokenizer.semantic_ids)


HISTORIES = SeqBatch.from_lists([[0, 1, 2], [3], [4, 5, 6, 7, 7], [8, 8]])


def test_is_a_ranker():
    *_, ranker = parts()
    assert isinstance(ranker, Ranker)
    assert ranker.name == "generative"


@settings(max_examples=25, deadline=None)
@given(
    level_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    num_items=st.integers(9, 60),
    seed=st.integers(0, 2**20),
)
def test_a_wide_beam_equals_brute_force_on_real_models(level_sizes, num_items, seed):
    level_sizes = [9, *level_sizes]
    model, tokenizer, ranker = parts(level_sizes, num_items, seed, batch_size=3)
    num_items = tokenizer.num_items
    item_ids, scores = ranker.rank(HISTORIES, num_items)
    check_ranking("generative", item_ids, scores, num_rows=4, k=num_items, num_items=num_items)
    assert item_ids.sort().values.tolist() == [list(range(num_items))] * 4
    torch.testing.assert_close(
        scores, brute_force(model, tokenizer, HISTORIES).gather(1, item_ids), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=15, deadline=None)
@given(beam_width=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 2**20))
def test_a_row_does_not_depend_on_its_batch(beam_width, k, seed):
    *_, ranker = parts(seed=seed, beam_width=beam_width)
    item_ids, scores = ranker.rank(HISTORIES, k)
    check_ranking("generative", item_ids, scores, num_rows=4, k=k, num_items=40)
    assert (item_ids >= 0).all()
    rows = [[0, 1, 2], [3], [4, 5, 6, 7, 7], [8, 8]]
    for row, history in enumerate(rows):
        alone, alone_scores = ranker.rank(SeqBatch.from_lists([history]), k)
        torch.testing.assert_close(alone_scores[0], scores[row], rtol=1e-4, atol=1e-4)
        differing = (alone[0] != item_ids[row]).nonzero().flatten()
        near_ties = (scores[row].diff().abs() < 1e-3).sum()
        assert len(differing) == 0 or near_ties > 0
    again = ranker.rank(HISTORIES, k)
    assert torch.equal(again[0], item_ids)
    assert torch.equal(again[1], scores)


@settings(max_examples=20, deadline=None)
@given(
    level_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    share=st.sampled_from([0.05, 0.5, 0.95]),
    per_row=st.booleans(),
    beam_width=st.integers(1, 5),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**20),
)
def test_masks_hold_and_a_wide_beam_fills_from_them_as_brute_force_does(
    level_sizes, share, per_row, beam_width, k, seed
):
    model, tokenizer, ranker = parts([11, *level_sizes], 60, seed, beam_width=beam_width, batch_size=3)
    num_items = tokenizer.num_items
    allowed = torch.rand(4 if per_row else 1, num_items, generator=torch.Generator().manual_seed(seed)) < share
    item_ids, scores = ranker.rank(HISTORIES, k, filter_of(allowed if per_row else allowed[0], 4))
    check_ranking("generative", item_ids, scores, num_rows=4, k=k, num_items=num_items)
    listed = item_ids >= 0
    assert torch.equal(listed.sum(1), allowed.expand(4, -1).sum(1).clamp(max=k))
    assert allowed.expand(4, -1).gather(1, item_ids.clamp(min=0))[listed].all()
    exact = brute_force(model, tokenizer, HISTORIES)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(scores[listed], exact.gather(1, item_ids.clamp(min=0))[listed], **close)
    if k >= num_items:
        torch.testing.assert_close(
            scores[:, :num_items], exact.where(allowed, -torch.inf).sort(descending=True)[0], **close
        )


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_lists_are_filled_from_what_is_allowed(per_row, batch_size):
    *_, ranker = parts(beam_width=2, batch_size=batch_size)
    allowed = torch.zeros(4, 40, dtype=torch.bool)
    allowed[:, [3, 30, 17]] = True
    allowed[2, 5] = per_row
    item_ids, scores = ranker.rank(HISTORIES, 4, filter_of(allowed if per_row else allowed[0], 4))
    assert [sorted(row) for row in item_ids.tolist()] == [
        [-1, 3, 17, 30],
        [-1, 3, 17, 30],
        [3, 5, 17, 30] if per_row else [-1, 3, 17, 30],
        [-1, 3, 17, 30],
    ]
    check_ranking("generative", item_ids, scores, num_rows=4, k=4, num_items=40)


def test_k_beyond_the_catalogue_is_padded():
    *_, ranker = parts()
    item_ids, scores = ranker.rank(HISTORIES, 50)
    assert item_ids[:, 40:].eq(-1).all()
    assert scores[:, 40:].isneginf().all()
    assert (item_ids[:, :40] >= 0).all()


def test_only_the_last_items_are_read():
    *_, ranker = parts(max_history=2)
    long, short = SeqBatch.from_lists([[9, 1, 2], [5, 3, 4, 5]]), SeqBatch.from_lists([[1, 2], [4, 5]])
    for one, other in zip(ranker.rank(long, 10), ranker.rank(short, 10), strict=True):
        torch.testing.assert_close(one, other)


def test_last_items():
    batch = SeqBatch.from_lists([[1, 2, 3, 4], [], [5], [6, 7, 8]])
    cut = last_items(batch, 2)
    assert (cut.item_ids.tolist(), cut.offsets.tolist(), cut.max_len) == ([3, 4, 5, 7, 8], [0, 2, 2, 3, 5], 2)
    assert cut.offsets.dtype == torch.int32
    assert last_items(batch, 4) is batch


def test_no_histories():
    *_, ranker = parts()
    item_ids, scores = ranker.rank(SeqBatch.from_lists([]), 3)
    assert item_ids.shape == scores.shape == (0, 3)


def test_training_mode_is_restored_and_dropout_is_off():
    model, _, ranker = parts()
    model.train()
    first, second = ranker.rank(HISTORIES, 10), ranker.rank(HISTORIES, 10)
    assert model.training
    assert torch.equal(first[1], second[1])


def test_broken_weights_are_an_error():
    model, _, ranker = parts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinite logits at level 0 for 4 of 4 histories"):
        ranker.rank(HISTORIES, 5)


def test_another_tokenizer_is_refused():
    model, tokenizer, _ = parts()
    other = FixedTokenizer(random_semantic_ids(10, [5, 6, 4]), (5, 6, 4))
    with pytest.raises(InputError, match=r"'text' codes of sizes \(5, 6, 3\).*got 'text' codes of sizes \(5, 6, 4\)"):
        GenerativeRanker(model, other)
    tokenizer.language = "image"
    with pytest.raises(InputError, match="got 'image' codes"):
        GenerativeRanker(model, tokenizer)


@pytest.mark.parametrize("name", ["beam_width", "max_history", "batch_size"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} of at least 1, got 0"):
        parts(**{name: 0})


@pytest.fixture
def tape(monkeypatch):
    """Searches are filled up and recorded as on a GPU, by ops that could run there."""
    tape = TapeRecorder()
    monkeypatch.setattr(ops.graphs, "recorder_for", lambda device: tape)
    monkeypatch.setattr("ops.checks._reads_values", lambda tensor: False)
    for room in ("attention", "codes", "layers"):
        monkeypatch.setattr(f"ops.{room}.uses_cpu_path", lambda device_type, seed: False)
    return tape


def histories_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randint(40, (length,), generator=generator).tolist() for length in lengths]
    users = torch.arange(len(lengths)) * 31
    return replace(SeqBatch.from_lists(items), user_hashes=users, targets=torch.zeros(len(lengths), dtype=torch.int64))


def assert_same_ranking(got, expected):
    """Up to rounding, which may part or swap near ties."""
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    gaps = torch.nn.functional.pad(expected[1].diff().abs().nan_to_num(torch.inf), (1, 1), value=torch.inf)
    near = torch.minimum(gaps[:, :-1], gaps[:, 1:]) < 1e-4
    assert torch.equal(got[0][~near], expected[0][~near])


@settings(max_examples=15, deadline=None)
@given(
    only=st.lists(st.booleans(), min_size=4, max_size=4),
    flags=st.booleans(),
    batch_size=st.integers(1, 5),
    normalize=st.sampled_from(["level", "children"]),
    seed=st.integers(0, 2**20),
)
def test_sets_and_flags_together_in_parts_of_any_size(only, flags, batch_size, normalize, seed):
    model, tokenizer, wide = parts(seed=seed, batch_size=batch_size, beam_width=40, normalize=normalize)
    generator = torch.Generator().manual_seed(seed)
    sets = [torch.randint(40, (size,), generator=generator).tolist() for size in (0, 5, 60, 9)]
    allowed = ItemFilter.from_lists(sets, only, torch.rand(40, generator=generator) < 0.6 if flags else None)
    item_ids, scores = wide.rank(HISTORIES, 40, allowed)
    full_ids, full_scores = GenerativeRanker(model, tokenizer, beam_width=40, normalize=normalize).rank(HISTORIES, 40)
    for row, permitted in enumerate(allowed.flags(40)):
        listed = item_ids[row][item_ids[row] >= 0]
        assert sorted(listed.tolist()) == permitted.nonzero().flatten().tolist()
        torch.testing.assert_close(
            scores[row, : len(listed)], full_scores[row][permitted[full_ids[row]]], rtol=1e-4, atol=1e-4
        )


def test_children_scores_are_probabilities_among_items():
    *_, ranker = parts(normalize="children")
    scores = ranker.rank(HISTORIES, 40)[1]
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(4))


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(InputError, match="normalize to be 'level' or 'children', got 'none'"):
        parts(normalize="none")


@pytest.mark.parametrize("recorded", [False, True])
def test_a_refreshed_ranker_ranks_as_a_new_one(request, recorded):
    if recorded:
        request.getfixturevalue("tape")
    model, tokenizer, ranker = parts(num_items=30)
    for _ in range(3):
        ranker.rank(HISTORIES, 40)
    grown = FixedTokenizer(random_semantic_ids(40, [5, 6, 3]), (5, 6, 3))
    assert torch.equal(grown.semantic_ids[:30], tokenizer.semantic_ids)
    grown.available = torch.arange(40) % 7 > 0
    ranker.refresh(grown)
    expected = GenerativeRanker(model, grown, cuda_graphs=False).rank(HISTORIES, 40)
    for _ in range(3):
        item_ids, scores = ranker.rank(HISTORIES, 40)
        assert_same_ranking((item_ids, scores), expected)
        assert sorted(item_ids[0].tolist()) == [-1] * 6 + grown.available.nonzero().flatten().tolist()


def test_a_refused_refresh_changes_nothing():
    _, tokenizer, ranker = parts()
    expected = ranker.rank(HISTORIES, 10)
    other = FixedTokenizer(random_semantic_ids(10, [5, 6, 4]), (5, 6, 4))
    with pytest.raises(InputError, match="got 'text' codes of sizes"):
        ranker.refresh(other)
    tokenizer.available = torch.zeros(40, dtype=torch.bool)
    with pytest.raises(InputError, match="at least one available item"):
        ranker.refresh(tokenizer)
    for one, other in zip(ranker.rank(HISTORIES, 10), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["all", "some", "per row"])
def test_filled_up_and_recorded_searches_rank_as_plain_ones(tape, kind):
    model, tokenizer, ranker = parts(batch_size=4, max_history=5, beam_width=6)
    plain = GenerativeRanker(model, tokenizer, batch_size=4, max_history=5, beam_width=6, cuda_graphs=False)
    flags = torch.rand(7, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed = {"all": None, "some": filter_of(flags[0], 7), "per row": filter_of(flags, 7)}[kind]
    for seed in range(4):
        # Parts of four and three rows, the second one filled up to four; empty rows, and one row with five items.
        histories = histories_of([1, 0, 2, 1, 5, 0, 3], seed)
        assert_same_ranking(ranker.rank(histories, 6, allowed), plain.rank(histories, 6, allowed))
    assert tape.log.count("record") == 2
    assert tape.log.count("replay") == 4


def test_recordings_read_the_weights_of_the_moment(tape):
    model, _, ranker = parts()
    for _ in range(3):
        before = ranker.rank(HISTORIES, 10)
    with torch.no_grad():
        model.heads["text"][0].weight.neg_()
    after = ranker.rank(HISTORIES, 10)
    assert tape.log[-1] == "replay"
    assert not torch.equal(before[0], after[0])


def test_broken_weights_are_an_error_when_recorded_too(tape):
    model, _, ranker = parts()
    for _ in range(3):
        ranker.rank(HISTORIES, 5)
    with torch.no_grad():
        model.heads["text"][1].weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN or infinite logits at level 1 for 4 of 4 histories"):
        ranker.rank(HISTORIES, 5)


def test_a_history_that_breaks_the_model_is_found_in_any_part(tape):
    """A replay overwrites what the one before found."""
    model, tokenizer, ranker = parts(batch_size=1)
    for _ in range(3):
        ranker.rank(HISTORIES, 5)
    with torch.no_grad():
        token = int(model.vocabulary.level_offsets("text")[0] + tokenizer.semantic_ids[9, 0])
        model.embedding.weight[token] = torch.nan
    others = (tokenizer.semantic_ids[:, 0] != tokenizer.semantic_ids[9, 0]).nonzero().flatten().tolist()
    with pytest.raises(InputError, match=r"at level 0 for 1 of 3 histories \(first: row 1\)"):
        ranker.rank(SeqBatch.from_lists([[others[0]], [9], [others[1]]]), 5)
    assert tape.log[-1] == "replay"


def test_nothing_waits_for_the_device(tape):
    """The recorder fails on what would: then there is no replay."""
    model, tokenizer, _ = parts()
    trie = PrefixTrie.from_semantic_ids(tokenizer.semantic_ids)
    tokens = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary)(HISTORIES)
    with pytest.raises(RuntimeError, match="not permitted while recording"):
        tape.record(lambda: beam_search(model, tokens, trie, 5))  # looks for broken logits


def test_last_items_without_a_wait_for_their_number(tape):
    """As on a GPU: items that belong to no row may lie behind the last one."""
    batch = SeqBatch.from_lists([[1, 2, 3, 4], [], [5], [6, 7, 8]])
    expected = last_items(batch, 2)
    with mock.patch("modules.ranking._knows_values", return_value=False):
        tape.record(lambda: last_items(batch, 2))
        cut = last_items(batch, 2)
    assert torch.equal(cut.offsets, expected.offsets)
    assert torch.equal(cut.item_ids[: len(expected.item_ids)], expected.item_ids)
    assert len(cut.item_ids) == 8


@pytest.mark.parametrize(
    ("lengths", "rows", "items"), [([3], 1, 3), ([0], 1, 3), ([20] * 5, 8, 100), ([20] * 100, 100, 2000)]
)
def test_capacities(lengths, rows, items):
    query = Query(histories_of(lengths), 5).to_capacity(max_rows=100, max_history=20)
    assert (len(query.histories), len(query.histories.item_ids), query.histories.max_len) == (rows, items, 20)


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_filter_of_other_rows_is_refused(rows):
    *_, ranker = parts(batch_size=2)
    with pytest.raises(ValueError, match=f"filter of 4 rows and.* got {rows} rows"):
        ranker.rank(HISTORIES, 3, ItemFilter.from_lists([[3]] * rows, [True] * rows))


@pytest.mark.parametrize("num_flags", [39, 41])
def test_flags_of_another_catalogue_are_refused(num_flags):
    *_, ranker = parts()
    with pytest.raises(ValueError, match=f"flags of 40 items, got 4 rows and {num_flags} flags"):
        ranker.rank(HISTORIES, 3, ItemFilter.for_all(torch.ones(num_flags, dtype=torch.bool), 4))
