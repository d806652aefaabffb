"""Catalogues that change: what a tokenizer keeps, and what it refuses."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.schemas import Catalogue, InputError
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer

NUM_ITEMS, NUM_KEYS = 20, 40
KEYS = [f"item-{item}" for item in range(NUM_KEYS)]
FEATURES = torch.randn(NUM_KEYS, 6, generator=torch.Generator().manual_seed(0))
DESCRIPTION = {
    "encoder": "sentence_transformers",
    "model": "model",
    "model_sha256": "ab",
    "template": ["{title}.", "{brand}"],
    "item_table_hash": "t0",
    "num_items": NUM_ITEMS,
}


def rqvae_with_few_codes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RqVae(RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(8,), codebook_sizes=(3, 2)))


RQVAE = rqvae_with_few_codes()  # 6 tuples for 40 items: most of them collide


def fitted(num_items=NUM_ITEMS, dedup_size=NUM_KEYS, **catalogue):
    columns = {"titles": [f"Title {item}" for item in range(num_items)], "categories": ["A > B"] * num_items}
    return SemanticIdTokenizer.fit(
        RQVAE,
        FEATURES[:num_items],
        Catalogue(KEYS[:num_items], **columns, **catalogue),
        feature_description=DESCRIPTION,
        dataset_manifest_hash="d0",
        dedup_size=dedup_size,
        metrics={"reconstruction_error": 0.25},
    )


TOKENIZER = fitted()
NEW_KEYS, NEW_FEATURES = KEYS[NUM_ITEMS:], FEATURES[NUM_ITEMS:]


@settings(max_examples=25, deadline=None)
@given(bounds=st.lists(st.integers(1, NUM_KEYS), max_size=4))
def test_items_added_piece_by_piece_get_the_ids_of_items_fitted_at_once(bounds):
    bounds = sorted({1, *bounds, NUM_KEYS})
    tokenizer = fitted(1)
    for begin, end in pairwise(bounds):
        tokenizer = tokenizer.with_items(KEYS[begin:end], FEATURES[begin:end])
    assert torch.equal(tokenizer.semantic_ids, fitted(NUM_KEYS).semantic_ids)
    assert tokenizer.content_hash == fitted(NUM_KEYS).content_hash
    assert tokenizer.catalogue_version == len(bounds)


CHANGES = st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from(KEYS), min_size=1, max_size=8)), max_size=8)


@settings(max_examples=25, deadline=None)
@given(changes=CHANGES)
def test_ids_stay_whatever_comes_and_goes(changes):
    tokenizer, there, ids, lineage = TOKENIZER, set(KEYS[:NUM_ITEMS]), {}, []
    for add, keys in changes:
        keys = sorted(keys - there if add else keys & there)
        if not keys or len(keys) == len(there):
            continue
        lineage.append(tokenizer.content_hash)
        if add:
            tokenizer = tokenizer.with_items(keys, FEATURES[[KEYS.index(key) for key in keys]])
            there |= set(keys)
        else:
            tokenizer = tokenizer.without_items(keys)
            there -= set(keys)
        known = tokenizer.catalogue.item_keys
        flags = torch.ones(len(known)).bool() if tokenizer.available is None else tokenizer.available
        assert {key for key, flag in zip(known, flags.tolist(), strict=True) if flag} == there
        assert tokenizer.num_available == len(there)
        assert tokenizer.lineage == tuple(lineage)
        now = dict(zip(known, enumerate(tokenizer.semantic_ids.tolist()), strict=True))
        assert now | ids == now
        ids = now
    assert len(tokenizer.semantic_ids.unique(dim=0)) == tokenizer.num_items
    assert torch.equal(tokenizer.semantic_ids[:NUM_ITEMS], TOKENIZER.semantic_ids)


def test_new_items_are_cold_and_texts_follow_their_keys():
    some_cold = fitted(cold=torch.arange(NUM_ITEMS) == 3)
    grown = some_cold.with_items(NEW_KEYS[:2], NEW_FEATURES[:2], titles=["Ä", ""])
    assert grown.catalogue.item_keys == KEYS[: NUM_ITEMS + 2]
    assert grown.catalogue.titles[NUM_ITEMS - 1 :] == ["Title 19", "Ä", ""]
    assert grown.catalogue.categories[NUM_ITEMS - 1 :] == ["A > B", "", ""]
    assert grown.catalogue.cold.nonzero()[:, 0].tolist() == [3, NUM_ITEMS, NUM_ITEMS + 1]
    unknown = TOKENIZER.with_items(NEW_KEYS[:1], NEW_FEATURES[:1]).catalogue.cold
    assert unknown.nonzero()[:, 0].tolist() == [NUM_ITEMS]


def test_an_item_that_comes_back_has_its_old_codes_whatever_its_features():
    removed = TOKENIZER.without_items([KEYS[4], KEYS[7]])
    assert (~removed.available).nonzero()[:, 0].tolist() == [4, 7]
    keys, features = [NEW_KEYS[0], KEYS[7]], torch.stack([NEW_FEATURES[0], -FEATURES[7]])
    back = removed.with_items(keys, features, categories=["C", "D"])
    assert torch.equal(back.semantic_ids[:NUM_ITEMS], TOKENIZER.semantic_ids)
    assert back.num_items == NUM_ITEMS + 1
    assert (~back.available).nonzero()[:, 0].tolist() == [4]
    assert [back.catalogue.categories[row] for row in (4, 7, NUM_ITEMS)] == ["A > B", "D", "C"]
    assert [back.catalogue.titles[row] for row in (4, 7, NUM_ITEMS)] == ["Title 4", "Title 7", ""]


def test_a_catalogue_restored_is_the_one_it_was():
    restored = TOKENIZER.without_items(KEYS[:2]).with_items(KEYS[:2], FEATURES[:2])
    assert restored.available is None
    assert restored.content_hash == TOKENIZER.content_hash
    assert restored.catalogue_version == 3


def test_the_content_hash_of_an_unchanged_catalogue_is_the_one_that_older_models_have_stored():
    rqvae = RqVae(RqVaeConfig(input_dim=2, embed_dim=2, hidden_dims=(2,), codebook_sizes=(2, 2)))
    with torch.no_grad():
        for tensor in rqvae.state_dict().values():
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    catalogue = Catalogue(["a", "ä", "b c"], [""] * 3, [""] * 3)
    ids = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1]])
    for available in (None, torch.ones(3).bool()):
        tokenizer = SemanticIdTokenizer(
            rqvae, ids, (2, 2, 4), catalogue, language="text", manifest={}, available=available
        )
        assert tokenizer.content_hash == "ec08fe0a958b9e2668521c2c2fc50fa9fa4d7abcd25c07d945aaa1784511a31b"
    assert tokenizer.without_items(["a"]).content_hash != tokenizer.content_hash


def test_versions_and_lineage():
    grown = TOKENIZER.with_items(NEW_KEYS[:1], NEW_FEATURES[:1])
    smaller = grown.without_items(KEYS[:1])
    assert (TOKENIZER.catalogue_version, TOKENIZER.lineage) == (1, ())
    assert (smaller.catalogue_version, smaller.lineage) == (3, (TOKENIZER.content_hash, grown.content_hash))
    assert len({TOKENIZER.content_hash, grown.content_hash, smaller.content_hash}) == 3
    assert smaller.is_version_of(TOKENIZER.content_hash)
    assert smaller.is_version_of(smaller.content_hash)
    assert not TOKENIZER.is_version_of(grown.content_hash)


def test_nothing_to_change_is_no_new_version():
    assert TOKENIZER.with_items([], FEATURES[:0]) is TOKENIZER
    assert TOKENIZER.without_items([]) is TOKENIZER


def test_round_trip(tmp_path):
    grown = TOKENIZER.with_items(NEW_KEYS, NEW_FEATURES, titles=NEW_KEYS)
    smaller = grown.without_items([KEYS[0], NEW_KEYS[-1]])
    for name, tokenizer in {"fitted": TOKENIZER, "grown": grown, "smaller": smaller}.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = SemanticIdTokenizer.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.semantic_ids, tokenizer.semantic_ids)
        assert loaded.catalogue.item_keys == tokenizer.catalogue.item_keys
        assert (loaded.catalogue_version, loaded.lineage) == (tokenizer.catalogue_version, tokenizer.lineage)
        assert loaded.content_hash == tokenizer.content_hash
        stored = load_file(tmp_path / name / "semantic_ids" / "text.safetensors")
        assert stored.keys() == ({"semantic_ids", "available"} if name == "smaller" else {"semantic_ids"})
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert ("lineage" in manifest) == (name != "fitted")
    assert torch.equal(loaded.available, smaller.available)
    assert loaded.with_items([KEYS[0]], FEATURES[:1]).num_available == smaller.num_available + 1


def test_card_and_manifest_describe_the_catalogue_as_it_is(tmp_path):
    TOKENIZER.with_items(NEW_KEYS, NEW_FEATURES).without_items(KEYS[:3]).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "40 items as tuples" in card
    assert "version 3 of the catalogue; items removed since the first: 3" in card
    metrics = json.loads((tmp_path / "a" / "manifest.json").read_text())["metrics"]
    assert metrics["codebook/largest_group"] == fitted(NUM_KEYS).manifest["metrics"]["codebook/largest_group"]
    assert metrics["codebook/largest_group"] > TOKENIZER.manifest["metrics"]["codebook/largest_group"]
    assert metrics["reconstruction_error"] == 0.25


def refused(message, change):
    before = (TOKENIZER.semantic_ids.clone(), list(TOKENIZER.catalogue.item_keys), dict(TOKENIZER.manifest))
    with pytest.raises(InputError, match=message):
        change()
    assert torch.equal(TOKENIZER.semantic_ids, before[0])
    assert (TOKENIZER.catalogue.item_keys, TOKENIZER.manifest) == before[1:]
    assert TOKENIZER.available is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x", "y", "x"], "every key once, got 'x' 2 times"),
        (["x", KEYS[2], KEYS[0]], "already has items 'item-2', 'item-0'"),
        (["x", ""], "an empty one at place 1"),
        ("xyz", "a list of strings, got the string 'xyz'"),
        (["x", 3], "strings, got 3 at place 1"),
        (["x", "\ud800"], "half a surrogate pair at place 1"),
    ],
)
def test_keys_that_cannot_be_added(keys, message):
    refused(message, lambda: TOKENIZER.with_items(keys, FEATURES[: len(keys)]))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, 5), r"features of shape \[2, 6\], .* got \[2, 5\]"),
        (torch.zeros(3, 6), r"features of shape \[2, 6\], .* got \[3, 6\]"),
        (torch.zeros(12), r"got \[12\]"),
        (torch.tensor([[0.0] * 6, [0.0] * 5 + [float("nan")]]), r"NaN or infinity in row 1 \(item 'y'\)"),
        (torch.tensor([[float("-inf")] * 6, [0.0] * 6]), r"row 0 \(item 'x'\)"),
    ],
)
def test_features_that_cannot_be_added(features, message):
    refused(message, lambda: TOKENIZER.with_items(["x", "y"], features))
    refused(message, lambda: TOKENIZER.with_items(["x", "y"], features.numpy()))


@pytest.mark.parametrize(
    "texts", [{"titles": ["one"]}, {"categories": ["a", "b", "c"]}, {"titles": "ab"}, {"titles": ["a", None]}]
)
def test_texts_that_do_not_fit_the_items(texts):
    refused(next(iter(texts)), lambda: TOKENIZER.with_items(["x", "y"], FEATURES[:2], **texts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "tfidf_svd"}, "encoder='sentence_transformers', .* got encoder='tfidf_svd'"),
        ({"model_sha256": "cd"}, "model_sha256='ab'"),
        ({"template": ("{title}.",)}, r"template=\['{title}.', '{brand}'\], .* got template=\['{title}.'\]"),
    ],
)
def test_features_of_another_encoder(changes, message):
    description = {**DESCRIPTION, **changes}
    refused(message, lambda: TOKENIZER.with_items(["x"], FEATURES[:1], feature_description=description))


def test_features_of_the_same_encoder_and_other_items():
    same = {**DESCRIPTION, "template": ("{title}.", "{brand}"), "item_table_hash": "t1", "num_items": 1}
    for description in (same, same | {"model": "renamed folder"}, {"encoder": "sentence_transformers"}, {}):
        grown = TOKENIZER.with_items(["x"], FEATURES[:1], feature_description=description)
        assert grown.num_items == NUM_ITEMS + 1


def test_without_hashes_the_names_of_models_count():
    tokenizer = fitted()
    tokenizer.manifest["features"] = {"encoder": "sentence_transformers", "model": "a/b"}
    with pytest.raises(InputError, match=r"model='a/b', .* got model='a/c'"):
        tokenizer.with_items(["x"], FEATURES[:1], feature_description={"model": "a/c"})


def test_a_full_tuple_names_the_item():
    tokenizer = fitted(1, dedup_size=2)
    full = tokenizer.with_items(["twin"], FEATURES[:1])
    codes = tuple(full.semantic_ids[0, :2].tolist())
    message = rf"item 'third' does not fit: the dedup level holds 2 .* \({codes[0]}, {codes[1]}\) is full"
    with pytest.raises(InputError, match=message):
        full.with_items(["third"], FEATURES[:1])
    with pytest.raises(InputError, match=message):
        full.without_items(["twin"]).with_items(["third"], FEATURES[:1])  # a removed item may come back
    with pytest.raises(InputError, match=r"item 'd' .* overflow: 1"):
        tokenizer.with_items(["c", "d"], FEATURES[[0, 0]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["x", KEYS[0]], "does not have item 'x'"),
        ([KEYS[0], KEYS[0]], "every key once"),
        (KEYS[:NUM_ITEMS], "needs an item that is not removed, got none among 20"),
        (KEYS[0], "a list of strings, got the string 'item-0'"),
    ],
)
def test_items_that_cannot_be_removed(keys, message):
    refused(message, lambda: TOKENIZER.without_items(keys))


def test_items_removed_already():
    with pytest.raises(InputError, match="does not have item 'item-0'"):
        TOKENIZER.without_items(KEYS[:2]).without_items(KEYS[:1])


@pytest.mark.parametrize(
    "changes",
    [{"catalogue_version": 3}, {"catalogue_version": "2"}, {"lineage": "ab"}, {"lineage": [1]}, {"lineage": []}],
)
def test_manifests_with_damaged_versions(tmp_path, changes):
    TOKENIZER.without_items(KEYS[:1]).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match="one more than the hashes in its lineage"):
        SemanticIdTokenizer.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("available", [torch.ones(NUM_ITEMS), torch.ones(3).bool(), torch.zeros(NUM_ITEMS).bool()])
def test_flags_that_do_not_fit(available):
    settings = {"language": "text", "manifest": {}, "available": available}
    with pytest.raises(InputError, match=r"available expected \[20\] bool|needs an item that is not removed"):
        SemanticIdTokenizer(
            TOKENIZER.rqvae, TOKENIZER.semantic_ids, TOKENIZER.level_sizes, TOKENIZER.catalogue, **settings
        )


def test_the_catalogue_of_an_earlier_version_does_not_change():
    catalogue = replace(TOKENIZER.catalogue, titles=list(TOKENIZER.catalogue.titles))
    removed = TOKENIZER.without_items(KEYS[:1])
    flags = removed.available.clone()
    removed.with_items(KEYS[:1], FEATURES[:1], titles=["new title"])
    assert torch.equal(removed.available, flags)
    assert removed.catalogue.titles == catalogue.titles
