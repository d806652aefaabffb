from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schemas import InputError, ItemFilter, SeqBatch
from evaluation.ranker import Ranker, check_ranking
from modules.generation.beam import beam_search
from modules.generation.exact import ExactRanker, exact_scores, exact_top_k
from modules.generation.ranker import GenerativeRanker
from modules.generation.trie import PrefixTrie
from modules.tokenizer.sequence import SequenceTokenizer
from tests.item_filters import filter_of
from tests.modules.generation_fakes import PrefixModel, all_log_likelihoods, random_semantic_ids, tokenized
from tests.modules.tiny_artifact import FixedTokenizer, tiny_model

ROWS = tokenized([[1, 2, 3], [4], [], [7, 7, 8]])


def scores_by_item(model, batch, trie, **settings_):
    """[B, N] from all parts."""
    scores = torch.full((len(batch), trie.num_items), torch.nan)
    for item_ids, part in exact_scores(model, batch, trie, **settings_):
        assert scores[:, item_ids].isnan().all()
        scores[:, item_ids] = part
    return scores


@pytest.mark.parametrize("max_beams", [1, 9, 40, 10_000])
def test_equals_log_likelihood_whatever_is_read_at_once(max_beams):
    level_sizes, model = (7, 1, 9, 3), PrefixModel((7, 1, 9, 3))
    semantic_ids = random_semantic_ids(60, level_sizes)
    got = scores_by_item(model, ROWS, PrefixTrie.from_semantic_ids(semantic_ids), max_beams=max_beams)
    assert max(rows * nodes for rows, nodes in model.calls) <= max(max_beams, len(ROWS))
    torch.testing.assert_close(got, all_log_likelihoods(model, ROWS, semantic_ids))


def test_every_prefix_is_read_once():
    semantic_ids = random_semantic_ids(60, (7, 5, 9))
    model, trie = PrefixModel((7, 5, 9)), PrefixTrie.from_semantic_ids(semantic_ids)
    model.calls.clear()
    scores_by_item(model, ROWS, trie, max_beams=12)
    assert sum(nodes for _, nodes in model.calls) == sum(len(level.codes) for level in trie.levels[:-1])


@settings(max_examples=15, deadline=None)
@given(
    level_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    max_beams=st.integers(1, 200),
    seed=st.integers(0, 2**20),
    normalize=st.sampled_from(["level", "children"]),
    share=st.sampled_from([None, 0.1, 0.7]),
    k=st.integers(1, 70),
)
def test_equals_a_beam_as_wide_as_the_catalogue_on_real_models(level_sizes, max_beams, seed, normalize, share, k):
    level_sizes = (9, *level_sizes)
    model = tiny_model(level_sizes, seed=seed).eval()
    tokenizer = FixedTokenizer(random_semantic_ids(60, list(level_sizes), seed), level_sizes)
    batch = SequenceTokenizer(tokenizer.semantic_ids, model.vocabulary)(SeqBatch.from_lists([[0, 1], [2], [3, 3, 4]]))
    trie = PrefixTrie.from_semantic_ids(tokenizer.semantic_ids)
    allowed = None
    if share is not None:
        flags = torch.rand(3, trie.num_items, generator=torch.Generator().manual_seed(seed)) < share
        allowed = filter_of(flags, 3)
    got = exact_top_k(model, batch, trie, k, allowed, normalize=normalize, max_beams=max_beams)
    width = max(k, trie.num_items)
    expected = beam_search(model, batch, trie, width, allowed, normalize=normalize)
    check_ranking("exact", *got, num_rows=3, k=k, num_items=trie.num_items)
    torch.testing.assert_close(got[1], expected[1][:, :k], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0] >= 0, expected[0][:, :k] >= 0)
    if allowed is not None:
        assert flags.gather(1, got[0].clamp(min=0))[got[0] >= 0].all()


def test_equal_scores_are_in_order_of_code_tuple_then_item():
    """All logits equal: items by tuple; items 1 and 4 share one."""
    semantic_ids = torch.tensor([[2, 0], [0, 1], [1, 1], [0, 0], [0, 1]])

    class Indifferent(PrefixModel):
        def step(self, state, codes, parents):
            return super().step(state, codes, parents) * 0.0

    model, trie = Indifferent((3, 2)), PrefixTrie.from_semantic_ids(semantic_ids)
    for max_beams in (1, 100):
        item_ids, scores = exact_top_k(model, ROWS, trie, 6, max_beams=max_beams)
        assert item_ids.tolist() == [[3, 1, 4, 2, 0, -1]] * 4
        torch.testing.assert_close(scores[:, :5], torch.full((4, 5), -torch.tensor(6.0).log().item()))
        unseen = ItemFilter.from_lists([[1], [], [0, 0, 3], [4, 2]])
        item_ids, _ = exact_top_k(model, ROWS, trie, 3, unseen, max_beams=max_beams)
        assert item_ids.tolist() == [[3, 4, 2], [3, 1, 4], [1, 4, 2], [3, 1, 0]]


def test_ranker_equals_the_generative_one_with_a_wide_beam():
    tokenizer = FixedTokenizer(random_semantic_ids(40, [5, 6, 3]), (5, 6, 3))
    model = tiny_model((5, 6, 3))
    exact = ExactRanker(model, tokenizer, batch_size=2, max_beams=7)
    wide = GenerativeRanker(model, tokenizer, batch_size=2, beam_width=40)
    assert isinstance(exact, Ranker)
    assert exact.name == "exact"
    histories = SeqBatch.from_lists([[0, 1, 2], [3], []])
    for allowed in (None, ItemFilter.unseen(histories)):
        got, expected = exact.rank(histories, 40, allowed), wide.rank(histories, 40, allowed)
        torch.testing.assert_close(got, expected)


def test_broken_logits_are_named():
    semantic_ids = random_semantic_ids(20, (4, 6))

    class Broken(PrefixModel):
        def step(self, state, codes, parents):
            logits = super().step(state, codes, parents)
            logits[2] = torch.nan if state.level == 2 else logits[2]
            return logits

    with pytest.raises(InputError, match=r"NaN or infinite logits at level 1 for 1 of 4 histories \(first: row 2\)"):
        exact_top_k(Broken((4, 6)), ROWS, PrefixTrie.from_semantic_ids(semantic_ids), 3)
    with pytest.raises(InputError, match="NaN or infinite logits at level 1 for 1 of 4"):
        list(exact_scores(Broken((4, 6)), ROWS, PrefixTrie.from_semantic_ids(semantic_ids)))


@pytest.mark.parametrize("normalize", ["level", "children"])
def test_items_below_children_of_probability_zero_are_not_listed(normalize):
    """A model may rule codes out; where all children of a prefix are, their share among themselves is NaN."""

    class Ruling(PrefixModel):
        def step(self, state, codes, parents):
            logits = super().step(state, codes, parents)
            logits[..., :2] = -torch.inf if state.level == 2 else logits[..., :2]
            return logits

    trie = PrefixTrie.from_semantic_ids(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 2]]))
    got = exact_top_k(Ruling((2, 3)), ROWS, trie, 4, normalize=normalize)
    assert got[0].tolist() == [[3, -1, -1, -1]] * 4
    torch.testing.assert_close(got, beam_search(Ruling((2, 3)), ROWS, trie, 4, normalize=normalize))


def test_a_model_of_fewer_codes_and_no_rows():
    trie = PrefixTrie.from_semantic_ids(torch.tensor([[0, 3]]))
    with pytest.raises(InputError, match="at least 4 codes of level 1 from the model, got 2"):
        list(exact_scores(PrefixModel((1, 2)), ROWS, trie))
    nobody = replace(tokenized([]), offsets=torch.zeros(1, dtype=torch.int32))
    assert list(exact_scores(PrefixModel((1, 4)), nobody, trie)) == []
