import warnings
from dataclasses import replace

import pytest
import torch

from data.schemas import NO_ITEM, Catalogue, InputError, SeqBatch, user_hashes
from modules.item_table import ItemTable
from modules.recommender import Recommendation, Recommender
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.sequence import SequenceTokenizer
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.modules.tiny_artifact import save_tiny_artifact, save_tiny_liger, save_tiny_sasrec

CATALOGUE = Catalogue(["a", "b", "c", "d"], ["Apple", "Bread", "", "Dates"], ["", "", "", ""])


class LowestFirst:
    """Ranks item 0 first; remembers what it was asked."""

    name = "lowest"

    def rank(self, histories, k, allowed=None):
        self.histories = histories
        allowed = torch.ones(len(histories), 4, dtype=torch.bool) if allowed is None else allowed.flags(4)
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


def test_more_than_the_catalogue_holds(recommender):
    (ranked,) = recommender.recommend([["a"]], 10**12)
    assert (len(ranked), ranked.complete) == (4, False)


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
        ([["a"]], 0, "k of at least 1"),
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


def test_lists_say_whether_they_are_complete(recommender):
    assert [ranked.complete for ranked in recommender.recommend([["a", "c"], ["d"]], 2)] == [True, True]
    lists = recommender.recommend([["a", "c"], ["d"]], 3, exclude_seen=True)
    assert [(len(ranked), ranked.complete) for ranked in lists] == [(2, False), (3, True)]
    assert lists[0] == [Recommendation("b", -1.0, "Bread"), Recommendation("d", -3.0, "Dates")]


def test_allow_and_deny_for_all_and_per_history(recommender):
    histories = [["a"], ["b"]]
    assert keys(recommender.recommend(histories, 4, allow={"d", "b"})) == [["b", "d"]] * 2
    assert keys(recommender.recommend(histories, 4, deny=["a"])) == [["b", "c", "d"]] * 2
    assert keys(recommender.recommend(histories, 4, allow=[["c", "b"], None], deny=["b"])) == [["c"], ["a", "c", "d"]]
    assert keys(recommender.recommend(histories, 4, allow=[], exclude_seen=True)) == [[], []]
    assert keys(recommender.recommend(histories, 4, deny=[None, ["d"]], exclude_seen=True)) == [
        ["b", "c", "d"],
        ["a", "c"],
    ]
    with pytest.raises(InputError, match="allow expected one collection of item keys or None per history, 2, got 1"):
        recommender.recommend(histories, 1, allow=[["a"]])


def test_what_needs_an_artifact_says_so(recommender):
    for call in (
        lambda: recommender.similar_items(["a"]),
        lambda: recommender.semantic_id("a"),
        lambda: recommender.add_items(["e"], torch.zeros(1, 6)),
        lambda: recommender.remove_items(["a"]),
        lambda: recommender.save_pretrained("x"),
    ):
        with pytest.raises(InputError, match=r"no model artifact. Make it with Recommender.from_pretrained"):
            call()


@pytest.fixture
def loaded(tmp_path):
    save_tiny_artifact(tmp_path / "model")
    return Recommender.from_pretrained(tmp_path / "model", device="cpu")


def full_ranking(recommender, history=("item-1", "item-2")):
    k = len(recommender.catalogue)
    return [(item.item_key, item.score) for item in recommender.recommend([list(history)], k)[0]]


def assert_same_ranking(got, expected):
    assert [key for key, _ in got] == [key for key, _ in expected]
    assert [score for _, score in got] == pytest.approx([score for _, score in expected])


def test_filters_leave_the_ranking_of_a_model_as_it_is(loaded):
    full = full_ranking(loaded)
    for allow, deny in (
        (["item-3", "item-7", "item-1"], None),
        (None, ["item-3"]),
        ([["item-0", "item-4"]], ["item-0"]),
    ):
        allowed = loaded.recommend([["item-1", "item-2"]], 12, allow=allow, deny=deny)[0]
        permitted = set(allow[0] if allow and isinstance(allow[0], list) else allow or dict(full)) - set(deny or ())
        expected = [place for place in full if place[0] in permitted]
        assert_same_ranking([(item.item_key, item.score) for item in allowed], expected)
        assert not allowed.complete


def test_similar_items(loaded):
    tokenizer = loaded.artifact.tokenizer
    codes = [tuple(row) for row in tokenizer.semantic_ids[:, :-1].tolist()]
    twins = next(
        (one, other) for one in range(12) for other in range(12) if one != other and codes[one] == codes[other]
    )
    (ranked,) = loaded.similar_items([f"item-{twins[0]}"], 11)
    assert len(ranked) == 11
    assert ranked.complete
    assert f"item-{twins[0]}" not in [item.item_key for item in ranked]
    scores = {item.item_key: item.score for item in ranked}
    assert scores[f"item-{twins[1]}"] == pytest.approx(1)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert keys(loaded.similar_items(["item-0", "item-1"], 3, allow=["item-1", "item-2"])) == [
        sorted(["item-1", "item-2"], key=lambda key: -scores_of(loaded, "item-0")[key]),
        ["item-2"],
    ]
    loaded.remove_items(["item-2"])
    assert "item-2" not in keys(loaded.similar_items(["item-2"], 12))[0]
    assert keys(loaded.similar_items(["item-1"], 3, allow=["item-2"])) == [[]]


def scores_of(recommender, item_key):
    return {item.item_key: item.score for item in recommender.similar_items([item_key], 11)[0]}


@pytest.mark.parametrize(
    ("item_keys", "message"),
    [(["item-1", "x", "y"], "the catalogue has no item x, y"), ("item-1", "got the string 'item-1'")],
)
def test_similar_items_of_what_is_no_item(loaded, item_keys, message):
    with pytest.raises(InputError, match=message):
        loaded.similar_items(item_keys)


def test_items_come_go_and_come_back(loaded, tmp_path):
    before, ids = full_ranking(loaded), loaded.artifact.tokenizer.semantic_ids
    new = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    loaded.add_items(["new-1", "new-2"], new, titles=["New", ""])
    assert "new-1" in loaded
    assert (loaded.display_name("new-1"), loaded.display_name("new-2")) == ("New", "new-2")
    grown = full_ranking(loaded)
    assert [key for key, _ in grown if not key.startswith("new")] == [key for key, _ in before]
    assert dict(grown) == pytest.approx({**dict(grown), **dict(before)})
    assert {"new-1", "new-2"} <= set(dict(grown))
    assert torch.equal(loaded.artifact.tokenizer.semantic_ids[:12], ids)
    assert loaded.recommend([["new-1"]], 14)[0].complete

    loaded.remove_items(["item-1", "new-2"])
    assert "item-1" in loaded
    assert [loaded.is_available(key) for key in ("item-1", "item-0", "new-1", "new-2")] == [False, True, True, False]
    assert_same_ranking(full_ranking(loaded), [place for place in grown if place[0] not in ("item-1", "new-2")])

    loaded.save_pretrained(tmp_path / "grown")
    again = Recommender.from_pretrained(tmp_path / "grown", device="cpu")
    assert full_ranking(again) == full_ranking(loaded)
    assert (
        again.semantic_id("new-1")
        == loaded.semantic_id("new-1")
        == tuple(loaded.artifact.tokenizer.semantic_ids[12].tolist())
    )
    again.add_items(["new-2", "item-1"], torch.zeros(2, 6))
    assert_same_ranking(full_ranking(again), grown)


@pytest.mark.parametrize(
    ("item_keys", "features"),
    [
        (["new", "new"], torch.zeros(2, 6)),
        (["new", "item-3"], torch.zeros(2, 6)),
        (["new"], torch.zeros(1, 7)),
        (["new"], torch.full((1, 6), torch.nan)),
    ],
)
def test_a_refused_change_changes_nothing(loaded, item_keys, features):
    before, artifact = full_ranking(loaded), loaded.artifact
    with pytest.raises(InputError):
        loaded.add_items(item_keys, features)
    with pytest.raises(InputError):
        loaded.remove_items(["item-3", "x"])
    assert loaded.artifact is artifact
    assert "new" not in loaded
    assert full_ranking(loaded) == before


def test_no_change_is_none(loaded):
    artifact = loaded.artifact
    loaded.add_items([], torch.zeros(0, 6))
    loaded.remove_items([])
    assert loaded.artifact is artifact


def test_a_ranker_that_cannot_change_says_so(loaded):
    loaded.ranker = LowestFirst()
    with pytest.raises(InputError, match="the ranker LowestFirst cannot change its catalogue"):
        loaded.remove_items(["item-1"])
    assert loaded.is_available("item-1")


@pytest.mark.parametrize("mode", ["dense", "hybrid@2", "hybrid@all"])
def test_new_items_are_ranked_at_once_by_their_features(tmp_path, mode):
    saved = save_tiny_liger(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu", mode=mode)
    before = dict(full_ranking(recommender))  # projects the catalogue as it was
    new = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    recommender.add_items(["new-0", "new-1", "new-2"], new)
    expected = cosines(saved, new, torch.zeros(3, dtype=torch.bool))
    grown = dict(full_ranking(recommender))
    assert {key: grown[key] for key in before} == pytest.approx(before, abs=1e-5)
    assert [grown[f"new-{place}"] for place in range(3)] == pytest.approx(expected, abs=1e-5)

    recommender.remove_items(["new-1", "item-10"])
    shrunk = full_ranking(recommender)
    assert not {"new-1", "item-10"} & set(dict(shrunk))
    assert {"new-0", "new-2", "item-9", "item-11"} <= set(dict(shrunk))
    recommender.save_pretrained(tmp_path / "grown")
    again = Recommender.from_pretrained(tmp_path / "grown", device="cpu", mode=mode)
    assert_same_ranking(full_ranking(again), shrunk)
    again.add_items(["new-1"], new[:1])  # it comes back as something else
    assert dict(full_ranking(again))["new-1"] == pytest.approx(expected[0], abs=1e-5)
    assert again.semantic_id("new-1") == recommender.semantic_id("new-1")


def cosines(artifact, features, missing, history=("item-1", "item-2")):
    """Of items with the model's query, step by step."""
    model = artifact.model
    table = artifact.items
    with torch.no_grad():
        vectors = model.project_items(table)
        tokenize = SequenceTokenizer(artifact.tokenizer.semantic_ids, model.vocabulary, language="text")
        ids = [artifact.catalogue.item_keys.index(key) for key in history]
        query = model.queries(tokenize(SeqBatch.from_lists([ids])), vectors)
        new = model.project_items(ItemTable(features, missing, ~missing))
    return torch.cosine_similarity(query, new).tolist()


def test_a_refused_change_of_a_model_with_items_changes_nothing(tmp_path, monkeypatch):
    save_tiny_liger(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu", mode="hybrid@3")
    before, artifact = full_ranking(recommender), recommender.artifact
    recommender.remove_items([])
    for features, message in ((torch.full((1, 6), torch.inf), "finite"), (torch.zeros(1, 5), r"shape \[1, 6\]")):
        with pytest.raises(InputError, match=message):
            recommender.add_items(["new"], features)
    monkeypatch.setitem(artifact.manifest, "item_features", {"encoder": "another"})
    with pytest.raises(InputError, match=r"reads other features than its tokenizer was fitted on: .*encoder='another'"):
        recommender.add_items(["new"], torch.zeros(1, 6))
    assert recommender.artifact is artifact
    assert "new" not in recommender
    assert full_ranking(recommender) == before


def test_features_of_items_that_come_back_are_checked_without_a_quantizer(tmp_path):
    """The tokenizer, whose ids were imported, does not look at them."""
    saved = save_tiny_liger(tmp_path / "model")
    ids = saved.tokenizer
    imported = SemanticIdTokenizer.from_ids(
        ids.semantic_ids, ids.level_sizes, ids.catalogue, collisions=CollisionPolicy.NONE
    )
    artifact = replace(saved, tokenizer=imported)
    recommender = Recommender(artifact.make_ranker(mode="dense"), artifact.catalogue, artifact=artifact)
    recommender.remove_items(["item-4"])
    with pytest.raises(InputError, match=r"finite values, got NaN or infinity in row 0 \(item 'item-4'\)"):
        recommender.add_items(["item-4"], torch.full((1, 6), torch.nan))
    with pytest.raises(InputError, match=r"shape \[1, 6\]"):
        recommender.add_items(["item-4"], torch.zeros(2, 6))
    recommender.add_items(["item-4"], torch.ones(1, 6))
    expected = cosines(artifact, torch.ones(1, 6), torch.tensor([False]))
    assert dict(full_ranking(recommender))["item-4"] == pytest.approx(expected[0], abs=1e-5)


def test_a_model_without_semantic_ids(tmp_path):
    save_tiny_sasrec(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    assert len(full_ranking(recommender)) == 12
    assert recommender.is_available("item-3")
    assert recommender.recommend([["item-1"]], 2, deny=["item-3"])[0].complete
    for call in (
        lambda: recommender.similar_items(["item-1"]),
        lambda: recommender.semantic_id("item-1"),
        lambda: recommender.add_items(["e"], torch.zeros(1, 6)),
        lambda: recommender.remove_items(["item-1"]),
    ):
        with pytest.raises(InputError, match="needs semantic ids, which a 'sasrec' model has not"):
            call()
    recommender.save_pretrained(tmp_path / "copy")
    assert full_ranking(Recommender.from_pretrained(tmp_path / "copy", device="cpu")) == full_ranking(recommender)
