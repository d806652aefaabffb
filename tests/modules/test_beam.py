import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError, ItemFilter
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from tests.item_filters import filter_of
from tests.modules.generation_fakes import PrefixModel, all_log_likelihoods, random_semantic_ids, tokenized

ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]


def search(semantic_ids, model, rows, width, flags=None, normalize="level"):
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    item_filter = None if flags is None else filter_of(flags, len(rows))
    return beam_search(model, tokenized(rows), trie, width, item_filter, normalize)


def log_likelihoods(model, semantic_ids, normalize):
    """[B, N] of every item after every row; among children by walking over the prefixes that items have."""
    batch = tokenized(ROWS)
    if normalize == "level":
        return all_log_likelihoods(model, batch, semantic_ids)
    tuples = semantic_ids.tolist()
    scores = torch.zeros(len(ROWS), len(tuples))
    for item, codes in enumerate(tuples):
        state, last, parents = model.start(batch), None, None
        for level, code in enumerate(codes):
            logits = model.step(state, last, parents)[:, 0]
            children = sorted({other[level] for other in tuples if other[:level] == codes[:level]})
            scores[:, item] += logits[:, code] - logits[:, children].logsumexp(1)
            last, parents = torch.full((len(ROWS), 1), code), torch.zeros(len(ROWS), 1, dtype=torch.int64)
    return scores


def in_tie_order(semantic_ids):
    """Items by code tuple, those of one tuple by item id."""
    return sorted(range(len(semantic_ids)), key=lambda item: (semantic_ids[item].tolist(), item))


def test_probabilities_by_hand():
    """After code 0 the second level is uniform, after code 1 it is (3/4, 1/4)."""
    model = PrefixModel([2, 2], width=2)
    model.tokens.zero_()
    model.code_tables[0].copy_(torch.tensor([[0.0, 0.0], [50.0, 0.0]]))
    model.heads[0].copy_(torch.zeros(2, 2))
    model.heads[1].copy_(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log())
    items, scores = search(torch.tensor([[0, 1], [1, 0], [1, 1]]), model, [[]], 3)
    # P(0, 1) = 1/2 * 1/2, P(1, 0) = 1/2 * 3/4, P(1, 1) = 1/2 * 1/4; the tuple (0, 0) is no item.
    assert items.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[3 / 8, 1 / 4, 1 / 8]]))


def test_equal_scores_break_by_code_order():
    semantic_ids = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]])
    model = PrefixModel([2, 2])
    for head in model.heads:
        head.zero_()
    for width, expected in [(1, [3]), (2, [3, 1]), (3, [3, 1, 2]), (4, [3, 1, 2, 0])]:
        assert search(semantic_ids, model, [[]], width)[0].tolist() == [expected]


def test_a_narrow_beam_follows_the_likeliest_prefix_only():
    """First codes 0.4 and 0.6, then (1/4, 1/4, 1/4, 1/4): a beam of one never sees what lies below the 0.4."""
    model = PrefixModel([2, 4], width=1)
    model.tokens.fill_(50.0)
    model.heads[0].copy_(torch.tensor([[0.4, 0.6]]).log())
    model.heads[1].zero_()
    semantic_ids = torch.tensor([[0, 0], [1, 3], [1, 2], [0, 1]])
    items, scores = search(semantic_ids, model, [[1]], 1)
    assert items.tolist() == [[2]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.6 / 4]]))
    assert search(semantic_ids, model, [[1]], 4)[0].tolist() == [[2, 1, 0, 3]]


def test_beams_never_exceed_the_nodes_of_a_level():
    semantic_ids = random_semantic_ids(30, [3, 20])
    model = PrefixModel([3, 20])
    items, scores = search(semantic_ids, model, ROWS, 100)
    assert model.calls == [(4, 3)]
    assert items.shape == scores.shape == (4, 100)
    assert items[:, 30:].eq(-1).all()
    assert scores[:, 30:].isneginf().all()
    assert items[:, :30].sort().values.tolist() == [list(range(30))] * 4


@settings(max_examples=80, deadline=None)
@given(
    level_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    num_items=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    rounded=st.booleans(),
    repeats=st.booleans(),
    normalize=st.sampled_from(["level", "children"]),
    share=st.sampled_from([None, 0.0, 0.3, 0.9]),
)
def test_a_wide_beam_equals_brute_force(level_sizes, num_items, seed, rounded, repeats, normalize, share):
    """With and without filters, and where items share tuples."""
    generator = torch.Generator().manual_seed(seed)
    semantic_ids = random_semantic_ids(num_items, level_sizes, seed)
    if repeats:
        semantic_ids = semantic_ids[torch.randint(len(semantic_ids), (len(semantic_ids) + 5,), generator=generator)]
    num_items = len(semantic_ids)
    model = PrefixModel(level_sizes, seed=seed)
    if rounded:  # exact ties between items, except among children of nodes of different numbers of them
        for head in model.heads:
            head.zero_()
    flags = None if share is None else torch.rand(len(ROWS), num_items, generator=generator) < share
    items, scores = search(semantic_ids, model, ROWS, num_items + seed % 3, flags, normalize)
    expected = log_likelihoods(model, semantic_ids, normalize)
    permitted = torch.ones_like(expected, dtype=torch.bool) if flags is None else flags
    for row in range(len(ROWS)):
        listed = items[row][items[row] >= 0]
        assert sorted(listed.tolist()) == permitted[row].nonzero().flatten().tolist()
        torch.testing.assert_close(scores[row, : len(listed)], expected[row, listed])
        assert items[row, len(listed) :].eq(-1).all()
        assert scores[row, len(listed) :].isneginf().all()
        if rounded and normalize == "level":
            assert listed.tolist() == [item for item in in_tie_order(semantic_ids) if permitted[row, item]]
    assert (scores[:, :-1] >= scores[:, 1:]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), normalize=st.sampled_from(["level", "children"]), repeats=st.booleans())
def test_a_filtered_list_is_the_full_ranking_minus_what_is_not_permitted(seed, normalize, repeats):
    generator = torch.Generator().manual_seed(seed)
    semantic_ids = random_semantic_ids(60, [5, 6, 4], seed)
    if repeats:
        semantic_ids = semantic_ids[torch.randint(60, (60,), generator=generator)]
    model = PrefixModel([5, 6, 4], seed=seed)
    flags = torch.rand(len(ROWS), 60, generator=generator) < 0.5
    full, full_scores = search(semantic_ids, model, ROWS, 60, None, normalize)
    some, some_scores = search(semantic_ids, model, ROWS, 60, flags, normalize)
    for row in range(len(ROWS)):
        kept = flags[row][full[row]]
        found, expected = some[row, : kept.sum()], full[row][kept]
        torch.testing.assert_close(some_scores[row, : kept.sum()], full_scores[row][kept])
        # Widths differ, and with them rounding, which may part or swap near ties.
        gaps = torch.nn.functional.pad(full_scores[row][kept].diff().abs(), (1, 1), value=torch.inf)
        near = torch.minimum(gaps[:-1], gaps[1:]) < 1e-4
        assert torch.equal(found[~near], expected[~near])
        assert sorted(found.tolist()) == sorted(expected.tolist())


def test_children_probabilities_sum_to_one():
    semantic_ids = random_semantic_ids(50, [7, 5, 3], seed=1)
    _, scores = search(semantic_ids, PrefixModel([7, 5, 3]), ROWS, 50, normalize="children")
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(ROWS)))
    _, scores = search(semantic_ids, PrefixModel([7, 5, 3]), ROWS, 50, normalize="level")
    assert (scores.exp().sum(1) < 0.99).all()


def test_items_that_share_a_tuple_come_in_order_of_their_ids():
    semantic_ids = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0], [1, 1]])
    model = PrefixModel([2, 2])
    for head in model.heads:
        head.zero_()
    assert search(semantic_ids, model, [[]], 5)[0].tolist() == [[3, 1, 0, 2, 4]]
    assert search(semantic_ids, model, [[]], 3)[0].tolist() == [[3, 1, 0]]
    model.heads[0][:, 1] = 1.0
    model.tokens.fill_(1.0)
    items, scores = search(semantic_ids, model, [[1]], 2)
    assert items.tolist() == [[0, 2]]
    assert scores[0, 0] == scores[0, 1]
    flags = torch.tensor([[False, True, False, True, True]])
    assert search(semantic_ids, model, [[1]], 2, flags)[0].tolist() == [[4, 3]]


@pytest.mark.parametrize("width", [1, 1024])
def test_the_narrowest_and_the_widest_beam(width):
    """2,000 items of which a row may get all but its two likeliest; the widest beam is exact below the first level."""
    semantic_ids = random_semantic_ids(2000, [3, 30, 40], seed=2)
    model = PrefixModel([3, 30, 40], seed=2)
    full = search(semantic_ids, model, ROWS, 2000)[0]
    unseen = ItemFilter.from_lists(full[:, :2].tolist())
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    items, scores = beam_search(model, tokenized(ROWS), trie, width, unseen)
    assert (items >= 0).all()
    assert not (items[:, :, None] == full[:, None, :2]).any()
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    if width == 1024:
        assert items[:, :20].tolist() == full[:, 2:22].tolist()


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 40), seed=st.integers(0, 2**20), normalize=st.sampled_from(["level", "children"]))
def test_lists_are_valid_distinct_sorted_and_do_not_depend_on_the_batch(width, seed, normalize):
    level_sizes = [5, 6, 4]
    semantic_ids = random_semantic_ids(60, level_sizes, seed)
    model = PrefixModel(level_sizes, seed=seed)
    items, scores = search(semantic_ids, model, ROWS, width, None, normalize)
    assert ((items >= 0) & (items < 60)).all()
    assert all(len(set(row)) == width for row in items.tolist())
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row in range(len(ROWS)):
        alone, alone_scores = search(semantic_ids, model, [ROWS[row]], width, None, normalize)
        torch.testing.assert_close(alone_scores[0], scores[row])
        assert alone.tolist()[0] == items.tolist()[row]
    again, again_scores = search(semantic_ids, model, ROWS, width, None, normalize)
    assert torch.equal(again, items)
    assert torch.equal(again_scores, scores)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 40), num_allowed=st.integers(0, 60), seed=st.integers(0, 2**20), per_row=st.booleans())
def test_masks_hold_and_lists_are_filled(width, num_allowed, seed, per_row):
    level_sizes = [5, 6, 4]
    semantic_ids = random_semantic_ids(60, level_sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ROWS), 60) if per_row else (60,)
    allowed = torch.rand(shape, generator=generator).argsort(-1) < num_allowed
    items, scores = search(semantic_ids, PrefixModel(level_sizes, seed=seed), ROWS, width, allowed)
    for row, flags in zip(items.tolist(), allowed.expand(len(ROWS), 60).tolist(), strict=True):
        real = [item for item in row if item >= 0]
        assert len(real) == min(width, num_allowed)
        assert all(flags[item] for item in real)
        assert row == real + [-1] * (width - len(real))
    assert scores.isneginf().equal(items < 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_an_error(value):
    model = PrefixModel([4, 4])
    model.heads[1][0, 2] = value
    with pytest.raises(InputError, match=r"NaN or infinite logits at level 1 for 4 of 4 histories \(first: row 0\)"):
        search(random_semantic_ids(10, [4, 4]), model, ROWS, 5)


def test_a_model_of_another_tokenizer_is_an_error():
    with pytest.raises(InputError, match="at least 9 codes of level 1 from the model, got 4"):
        search(torch.tensor([[0, 0], [1, 8]]), PrefixModel([4, 4]), ROWS, 5)


def test_items_of_probability_zero_are_not_listed():
    class Masked(PrefixModel):
        def step(self, state, codes, parents):
            logits = super().step(state, codes, parents)
            logits[..., 1] = -torch.inf
            return logits

    items, scores = search(torch.tensor([[1], [0], [2]]), Masked([3]), [[1]], 3)
    assert sorted(items[0].tolist()) == [-1, 1, 2]
    assert scores[0].isneginf().tolist() == [False, False, True]
