import warnings

import pytest
import torch

from data.schemas import NO_ITEM, Catalogue, InputError, user_hashes
from modules.recommender import Recommendation, Recommender
from tests.modules.tiny_artifact import save_tiny_artifact

CATALOGUE = Catalogue(["a", "b", "c", "d"], ["Apple", "Bread", "", "Dates"], ["", "", "", ""])


class LowestFirst:
    """Ranks item 0 first; remembers what it was asked."""

    name = "lowest"

    def rank(self, histories, k, allowed=None):
        self.histories = histories
        allowed = torch.ones(len(histories), 4, dtype=torch.bool) if allowed is None else allowed
        item_ids = torch.full((len(histories), k), NO_ITEM)
        scores = torch.full((len(histories), k), -torch.inf)
        for row, flags in enumerate(allowed):
            listed = flags.nonzero().flatten()[:k]
            item_ids[row, : len(listed)] = listed
            scores[row, : len(listed)] = -listed.float()
        return item_ids, scores


@pytest.fixture
def recommender():
    return Recommender(LowestFirst(), CATALOGUE)


def keys(lists):
    return [[item.item_key for item in items] for items in lists]


def test_keys_in_keys_out(recommender):
    assert (
        recommender.recommend([["d", "a"], ["b"]], 2)
        == [[Recommendation("a", 0.0, "Apple"), Recommendation("b", -1.0, "Bread")]] * 2
    )
    assert recommender.ranker.histories.item_ids.tolist() == [3, 0, 1]
    assert recommender.ranker.histories.offsets.tolist() == [0, 2, 3]


def test_users_get_the_hash_of_the_prepared_dataset(recommender):
    recommender.recommend([["a"], ["b"], ["c"]], 1, users=["alice", None, ""])
    assert recommender.ranker.histories.user_hashes.tolist() == [-8513398901633652147, 0, -5426141060434712860]
    recommender.recommend([["a"], ["b"]], 1)
    assert recommender.ranker.histories.user_hashes.tolist() == [0, 0]


@pytest.mark.parametrize("users", [["alice"], [], "al"])
def test_as_many_users_as_histories(recommender, users):
    with pytest.raises(InputError, match="one user key or None per history, 2 in all"):
        recommender.recommend([["a"], ["b"]], 1, users=users)


def test_the_user_changes_what_a_model_with_user_tokens_recommends(tmp_path):
    save_tiny_artifact(tmp_path / "model")  # its model has 7 user tokens, one of them for unknown users
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    users = [f"user-{number}" for number in range(12)]
    lists = recommender.recommend([["item-1", "item-2"]] * 12, 12, users=users)
    by_token = {}
    for user, ranked in zip(users, lists, strict=True):
        scores = tuple(round(item.score, 4) for item in ranked)
        assert by_token.setdefault(int(user_hashes([user])[0]) % 6, scores) == scores
    assert len(set(by_token.values())) == len(by_token) > 1


def test_exclude_seen_is_per_row_and_lists_may_be_shorter(recommender):
    lists = recommender.recommend([["a", "c"], ["d", "d"]], 4, exclude_seen=True)
    assert keys(lists) == [["b", "d"], ["a", "b", "c"]]


def test_unknown_keys_are_skipped_with_one_warning(recommender):
    histories = [["x1", "b", "x2"], ["x1", "x3", "x4", "x5", "x6", "c"]]
    with pytest.warns(UserWarning, match=r"skipped 6 item keys .* x1, x2, x3, x4, x5, \.\.\.$") as caught:
        recommender.recommend(histories, 1)
    assert len(caught) == 1
    assert recommender.ranker.histories.item_ids.tolist() == [1, 2]


def test_known_keys_warn_of_nothing(recommender):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recommender.recommend([["a"]], 1)


@pytest.mark.parametrize(
    ("histories", "k", "message"),
    [
        ([["a"], []], 1, "history 1 is empty"),
        ([["x", "y"]], 1, "history 0 has no item that the catalogue knows; got 2 unknown keys: x, y"),
        ([["a"]], 5, "k from 1 to 4, the size of the catalogue, got 5"),
        ([["a"]], 0, "k from 1 to 4"),
        (["ab"], 1, r"the string 'ab' as history 0. Write recommend\(\[history\]\)"),
    ],
)
def test_bad_input_is_named(recommender, histories, k, message):
    with pytest.raises(InputError, match=message):
        recommender.recommend(histories, k)


def test_no_histories(recommender):
    assert recommender.recommend([], 2) == []


def test_names_of_items(recommender):
    assert "a" in recommender
    assert "x" not in recommender
    assert (recommender.display_name("b"), recommender.display_name("c")) == ("Bread", "c")


def test_from_an_artifact(tmp_path):
    artifact = save_tiny_artifact(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu", beam_width=3, batch_size=1)
    assert (recommender.ranker.beam_width, recommender.ranker.batch_size) == (3, 1)
    assert recommender.ranker.max_history == artifact.ranker_settings["max_history"]
    lists = recommender.recommend([["item-1", "item-2"], ["item-0"]], 12)
    assert [sorted(row) for row in keys(lists)] == [sorted(f"item-{item}" for item in range(12))] * 2
    scores = [item.score for item in lists[0]]
    assert scores == sorted(scores, reverse=True)
    assert lists[0][0].title == f"Title {lists[0][0].item_key.removeprefix('item-')}"
    unseen = recommender.recommend([["item-1", "item-2"]], 12, exclude_seen=True)
    assert set(keys(unseen)[0]) == {f"item-{item}" for item in range(12)} - {"item-1", "item-2"}
