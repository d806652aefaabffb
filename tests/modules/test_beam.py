import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from tests.modules.generation_fakes import PrefixModel, all_log_likelihoods, random_semantic_ids, tokenized

ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]


def search(semantic_ids, model, rows, width, allowed=None):
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    node_allowed = None if allowed is None else trie.allowed_nodes(allowed)
    return beam_search(model, tokenized(rows), trie, width, node_allowed)


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


@settings(max_examples=60, deadline=None)
@given(
    level_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    num_items=st.integers(1, 80),
    seed=st.integers(0, 2**20),
    rounded=st.booleans(),
)
def test_a_wide_beam_equals_brute_force(level_sizes, num_items, seed, rounded):
    semantic_ids = random_semantic_ids(num_items, level_sizes, seed)
    model = PrefixModel(level_sizes, seed=seed)
    if rounded:  # exact ties between items
        for head in model.heads:
            head.zero_()
    items, scores = search(semantic_ids, model, ROWS, len(semantic_ids) + seed % 3)
    expected = all_log_likelihoods(model, tokenized(ROWS), semantic_ids)
    kept = items[:, : len(semantic_ids)]
    assert kept.sort().values.tolist() == [list(range(len(semantic_ids)))] * len(ROWS)
    torch.testing.assert_close(scores[:, : len(semantic_ids)], expected.gather(1, kept))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    if rounded:
        in_code_order = sorted(range(len(semantic_ids)), key=lambda item: semantic_ids[item].tolist())
        assert kept.tolist() == [in_code_order] * len(ROWS)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_lists_are_valid_distinct_sorted_and_do_not_depend_on_the_batch(width, seed):
    level_sizes = [5, 6, 4]
    semantic_ids = random_semantic_ids(60, level_sizes, seed)
    model = PrefixModel(level_sizes, seed=seed)
    items, scores = search(semantic_ids, model, ROWS, width)
    assert ((items >= 0) & (items < 60)).all()
    assert all(len(set(row)) == width for row in items.tolist())
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row in range(len(ROWS)):
        alone, alone_scores = search(semantic_ids, model, [ROWS[row]], width)
        torch.testing.assert_close(alone_scores[0], scores[row])
        assert alone.tolist()[0] == items.tolist()[row]
    again, again_scores = search(semantic_ids, model, ROWS, width)
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
