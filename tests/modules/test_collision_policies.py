"""Tokenizers under each collision policy: ids, artifacts, catalogues that change, and ids without a quantizer."""

import json

import pytest
import torch

from data.schemas import Catalogue, InputError
from modules.quantize import Distance
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.collisions import collision_groups, sharing_items
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer

DEDUP_CODE, NEAREST_FREE, NONE = CollisionPolicy
SIZES, NUM_ITEMS, NUM_KEYS = (6, 4, 5), 50, 90
KEYS = [f"item-{item}" for item in range(NUM_KEYS)]


def make_features():
    features = torch.randn(NUM_KEYS, 6, generator=torch.Generator().manual_seed(0))
    features[8] = features[20] = features[NUM_ITEMS] = features[3]
    return features


FEATURES = make_features()


def make_rqvae(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RqVae(RqVaeConfig(input_dim=6, embed_dim=4, hidden_dims=(8,), codebook_sizes=SIZES, **settings))


def fitted(policy, num_items=NUM_ITEMS, rqvae=None, **settings):
    catalogue = Catalogue(KEYS[:num_items], [f"Title {item}" for item in range(num_items)], [""] * num_items)
    description = {"feature_description": {}, "dataset_manifest_hash": "d0", "collisions": policy}
    return SemanticIdTokenizer.fit(rqvae or make_rqvae(), FEATURES[:num_items], catalogue, **description, **settings)


def num_distinct(codes):
    return len(codes.unique(dim=0))


def test_groups_are_listed_largest_first():
    codes = torch.tensor([[1, 2], [0, 5], [1, 2], [3, 3], [1, 2], [0, 5], [0, 1], [0, 1]])
    assert collision_groups(codes) == [[0, 2, 4], [6, 7], [1, 5]]
    assert sharing_items(codes).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert collision_groups(codes[[0, 1, 3]]) == []
    assert sharing_items(codes[[0, 1, 3]]).tolist() == []


@pytest.mark.parametrize("policy", CollisionPolicy)
def test_ids_and_numbers(policy):
    tokenizer = fitted(policy)
    codes, distinct = fitted(NONE).codes, num_distinct(fitted(NONE).codes)
    assert distinct < NUM_ITEMS - 3
    assert torch.equal(tokenizer.nearest_codes, codes)
    assert torch.equal(tokenizer.encode(FEATURES[:NUM_ITEMS]), codes)
    assert (tokenizer.collision_policy, tokenizer.num_codebooks, tokenizer.codebook_sizes) == (policy, 3, SIZES)
    assert tokenizer.codes.shape == (NUM_ITEMS, 3)
    assert tokenizer.semantic_ids.shape == (NUM_ITEMS, 3 + (policy is DEDUP_CODE))
    assert tokenizer.level_sizes[:3] == SIZES
    assert len(tokenizer.level_sizes) == tokenizer.semantic_ids.shape[1]
    after = {name: value for name, value in tokenizer.manifest["metrics"].items() if "semantic_ids/" in name}
    expected = {
        DEDUP_CODE: {"semantic_ids/unique_ratio": 1.0, "semantic_ids/colliding": 0.0},
        NEAREST_FREE: {
            "semantic_ids/unique_ratio": 1.0,
            "semantic_ids/colliding": 0.0,
            "semantic_ids/moved": float(NUM_ITEMS - distinct),
        },
        NONE: {
            "semantic_ids/unique_ratio": distinct / NUM_ITEMS,
            "semantic_ids/colliding": float(len(sharing_items(codes))),
        },
    }
    assert after == expected[policy]
    assert tokenizer.manifest["metrics"]["codebook/unique_ratio"] == distinct / NUM_ITEMS
    groups = tokenizer.collisions()
    assert sum(map(len, groups)) == after["semantic_ids/colliding"]
    assert (policy is NONE) == any({3, 8, 20} <= set(group) for group in groups)


@pytest.mark.parametrize("distance", Distance)
def test_nearest_free_moves_as_few_items_as_can_be_and_the_nearest_stays(distance):
    rqvae = make_rqvae(distance=distance)
    tokenizer = fitted(NEAREST_FREE, rqvae=rqvae)
    nearest, codes = tokenizer.nearest_codes, tokenizer.codes
    moved = (nearest != codes).any(dim=1)
    assert num_distinct(codes) == NUM_ITEMS
    assert int(moved.sum()) == NUM_ITEMS - num_distinct(nearest)
    latents, books = rqvae.eval().encode(FEATURES[:NUM_ITEMS]).detach(), rqvae.codebooks()
    residual = latents - sum(books[level][nearest[:, level]] for level in range(2)).detach()
    cost = rqvae.level_costs(residual, 2).gather(1, nearest[:, 2:])[:, 0]
    for group in collision_groups(nearest):
        (kept,) = [item for item in group if not moved[item]]
        assert float(cost[kept]) <= float(cost[group].min()) + 1e-6
    assert torch.equal(fitted(NEAREST_FREE, rqvae=rqvae).semantic_ids, tokenizer.semantic_ids)


def test_the_id_space_may_be_filled_to_the_last_id_but_no_further():
    catalogue = Catalogue(KEYS[:9], [""] * 9, [""] * 9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rqvae = RqVae(RqVaeConfig(input_dim=6, embed_dim=2, hidden_dims=(), codebook_sizes=(3, 3)))
    settings = {"feature_description": {}, "dataset_manifest_hash": "", "collisions": NEAREST_FREE}
    same = torch.ones(10, 6)
    full = SemanticIdTokenizer.fit(rqvae, same[:9], catalogue, **settings)
    assert num_distinct(full.semantic_ids) == 9
    larger = Catalogue(KEYS[:10], [""] * 10, [""] * 10)
    with pytest.raises(InputError, match=r"all 9 ids of codebooks of \(3, 3\) codes are taken"):
        SemanticIdTokenizer.fit(rqvae, same, larger, **settings)
    with pytest.raises(InputError, match="all 9 ids"):
        full.with_items(["x"], FEATURES[:1])
    with pytest.raises(InputError, match="all 9 ids"):  # a removed item may come back
        full.without_items(KEYS[:1]).with_items(["x"], FEATURES[:1])


@pytest.mark.parametrize("policy", [NEAREST_FREE, NONE])
def test_a_dedup_size_needs_a_dedup_level(policy):
    with pytest.raises(InputError, match=r"dedup_size expected None, .* has no dedup level, got 8"):
        fitted(policy, dedup_size=8)


@pytest.mark.parametrize("policy", CollisionPolicy)
def test_round_trip(tmp_path, policy):
    tokenizer = fitted(policy).without_items([KEYS[5]])
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.collision_policy is policy
    assert loaded.content_hash == tokenizer.content_hash
    for name in ("semantic_ids", "nearest_codes", "codes", "available"):
        assert torch.equal(getattr(loaded, name), getattr(tokenizer, name))
    config = json.loads((tmp_path / "a" / "config.json").read_text())["languages"]["text"]
    assert config["collision_policy"] == policy.value
    assert f"collision policy `{policy.value}`" in (tmp_path / "a" / "README.md").read_text()
    assert (tmp_path / "a" / "collisions.json").is_file() == (policy is NONE)
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_hashes_differ_by_policy():
    """Even where no items share codes, so that ids are equal."""
    one = [fitted(policy, num_items=1) for policy in (NEAREST_FREE, NONE)]
    assert torch.equal(one[0].semantic_ids, one[1].semantic_ids)
    assert one[0].content_hash != one[1].content_hash


def test_listed_collisions_name_the_items(tmp_path):
    tokenizer = fitted(NONE)
    tokenizer.save_pretrained(tmp_path / "a")
    listed = json.loads((tmp_path / "a" / "collisions.json").read_text(encoding="utf-8"))
    assert listed["num_ids"] == len(tokenizer.collisions()) == len(listed["groups"]) > 0
    for group, item_ids in zip(listed["groups"], tokenizer.collisions(), strict=True):
        assert group["item_keys"] == [KEYS[item_id] for item_id in item_ids]
        assert [tuple(group["codes"])] * len(item_ids) == [tuple(row) for row in tokenizer.codes[item_ids].tolist()]
    (tmp_path / "a" / "collisions.json").write_text("{}")
    with pytest.raises(InputError, match=r"collisions\.json is damaged"):
        SemanticIdTokenizer.from_pretrained(tmp_path / "a")


def test_an_artifact_of_format_1_is_read_and_keeps_its_hash(tmp_path):
    tokenizer = fitted(DEDUP_CODE)
    tokenizer.save_pretrained(tmp_path / "a")
    as_format_1(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.collision_policy is DEDUP_CODE
    assert torch.equal(loaded.semantic_ids, tokenizer.semantic_ids)
    assert loaded.content_hash == tokenizer.content_hash


def as_format_1(folder, **changes):
    """Rewrite an artifact as the first format had it, or with other settings of its language."""
    from modules.tokenizer.artifact_folder import file_hashes

    config = json.loads((folder / "config.json").read_text())
    settings = config["languages"]["text"]
    del settings["collision_policy"]
    settings.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= file_hashes(folder, ["config.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collision_policy": "hope"}, "collision_policy of dedup_code, nearest_free, none, got 'hope'"),
        ({"collision_policy": ["none"]}, "collision_policy of dedup_code, nearest_free, none, got"),
        ({"level_sizes": [6, 4, 5]}, "a: expected level sizes .* and a dedup level"),
        ({"level_sizes": []}, "expected level sizes"),
        ({"collision_policy": "none", "level_sizes": [6, 4, 5, 4]}, r"no hash of collisions\.json"),
        ({"collision_policy": "nearest_free", "level_sizes": [6, 4, 5, 4]}, "expected level sizes"),
        ({"rqvae": None}, "contradicts itself"),
        ({"rqvae": {"input_dim": 0}}, "a: RqVaeConfig"),
    ],
)
def test_settings_that_contradict_the_artifact(tmp_path, changes, message):
    fitted(DEDUP_CODE).save_pretrained(tmp_path / "a")
    as_format_1(tmp_path / "a", **changes)
    with pytest.raises(InputError, match=message):
        SemanticIdTokenizer.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("policy", [NEAREST_FREE, NONE])
def test_old_ids_stay_whatever_joins(policy):
    tokenizer = fitted(policy)
    whole = tokenizer.with_items(KEYS[NUM_ITEMS:], FEATURES[NUM_ITEMS:])
    assert torch.equal(whole.semantic_ids[:NUM_ITEMS], tokenizer.semantic_ids)
    assert torch.equal(whole.nearest_codes, whole.encode(FEATURES))
    assert (num_distinct(whole.semantic_ids) == NUM_KEYS) == (policy is NEAREST_FREE)
    pieces = tokenizer
    for begin, end in ((50, 51), (51, 70), (70, 90)):
        pieces = pieces.with_items(KEYS[begin:end], FEATURES[begin:end])
    assert torch.equal(pieces.semantic_ids, whole.semantic_ids)
    free = (whole.nearest_codes[NUM_ITEMS:, None] != tokenizer.semantic_ids[None]).any(dim=2).all(dim=1)
    for item in (NUM_ITEMS + free.nonzero()[:, 0]).tolist():
        alone = tokenizer.with_items(KEYS[item : item + 1], FEATURES[item : item + 1])
        assert torch.equal(alone.codes[-1], whole.nearest_codes[item])  # what is free is not moved


@pytest.mark.parametrize("policy", [NEAREST_FREE, NONE])
def test_numbers_follow_the_catalogue(tmp_path, policy):
    tokenizer = fitted(policy).with_items(KEYS[NUM_ITEMS:], FEATURES[NUM_ITEMS:])
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    metrics, distinct = loaded.manifest["metrics"], num_distinct(tokenizer.nearest_codes)
    assert metrics["codebook/unique_ratio"] == distinct / NUM_KEYS
    assert torch.equal(loaded.nearest_codes, tokenizer.nearest_codes)
    if policy is NEAREST_FREE:
        assert metrics["semantic_ids/moved"] >= NUM_KEYS - distinct
        assert metrics["semantic_ids/moved"] == int((loaded.codes != loaded.nearest_codes).any(dim=1).sum())
        assert metrics["semantic_ids/colliding"] == 0
    else:
        assert metrics["semantic_ids/colliding"] == len(sharing_items(loaded.codes))


def test_items_that_come_back_between_those_that_join_do_not_change_their_ids():
    tokenizer, joining = fitted(NEAREST_FREE), range(NUM_ITEMS, NUM_KEYS)
    order = [7, *joining[:20], 0, *joining[20:]]
    mixed = tokenizer.without_items([KEYS[0], KEYS[7]]).with_items([KEYS[item] for item in order], FEATURES[order])
    assert torch.equal(mixed.semantic_ids, tokenizer.with_items(KEYS[NUM_ITEMS:], FEATURES[NUM_ITEMS:]).semantic_ids)


@pytest.mark.parametrize("policy", [NEAREST_FREE, NONE])
def test_a_removed_item_keeps_its_id(policy):
    tokenizer = fitted(policy)
    removed = tokenizer.without_items([KEYS[3]])
    assert torch.equal(removed.semantic_ids, tokenizer.semantic_ids)
    grown = removed.with_items([KEYS[NUM_ITEMS], KEYS[3]], FEATURES[[NUM_ITEMS, 3]])
    assert torch.equal(grown.semantic_ids[:NUM_ITEMS], tokenizer.semantic_ids)
    assert grown.available is None
    assert (num_distinct(grown.semantic_ids[[3, NUM_ITEMS]]) == 2) == (policy is NEAREST_FREE)


def test_nearest_codes_come_with_nearest_free_alone():
    one = fitted(NEAREST_FREE)
    arguments = (one.rqvae, one.semantic_ids, one.level_sizes, one.catalogue)
    settings = {"language": "text", "manifest": {}}
    with pytest.raises(InputError, match="nearest_codes expected under NEAREST_FREE alone, got none"):
        SemanticIdTokenizer(*arguments, **settings, collision_policy=NEAREST_FREE)
    with pytest.raises(InputError, match="nearest_codes expected under NEAREST_FREE alone, got some"):
        SemanticIdTokenizer(*arguments, **settings, collision_policy=NONE, nearest_codes=one.nearest_codes)
    nearest = one.nearest_codes[1:]
    with pytest.raises(InputError, match="nearest codes of 50 items, got 49"):
        SemanticIdTokenizer(*arguments, **settings, collision_policy=NEAREST_FREE, nearest_codes=nearest)


IDS = torch.tensor([[0, 1, 2], [3, 1, 2], [0, 1, 2], [1, 0, 0], [0, 1, 2]])


def imported(policy, **settings):
    catalogue = Catalogue(KEYS[:5], [""] * 5, [""] * 5)
    return SemanticIdTokenizer.from_ids(IDS.int(), [4, 2, 3], catalogue, collisions=policy, **settings)


@pytest.mark.parametrize("policy", [DEDUP_CODE, NONE])
def test_imported_ids(tmp_path, policy):
    tokenizer = imported(policy, language="image", manifest={"provenance": {"file": "ids"}, "metrics": {"own": 2.0}})
    dedup = policy is DEDUP_CODE
    assert tokenizer.semantic_ids.tolist() == (
        [[0, 1, 2, 0], [3, 1, 2, 0], [0, 1, 2, 1], [1, 0, 0, 0], [0, 1, 2, 2]] if dedup else IDS.tolist()
    )
    assert tokenizer.level_sizes == ((4, 2, 3, 8) if dedup else (4, 2, 3))
    assert torch.equal(tokenizer.codes, IDS)
    assert tokenizer.collisions() == ([] if dedup else [[0, 2, 4]])
    assert tokenizer.manifest["metrics"]["codebook/unique_ratio"] == 0.6
    assert tokenizer.manifest["metrics"]["own"] == 2.0
    tokenizer.without_items(KEYS[:1]).save_pretrained(tmp_path / "a")
    loaded = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.rqvae is None
    assert loaded.language == "image"
    assert loaded.is_version_of(tokenizer.content_hash)
    assert not (tmp_path / "a" / "quantizers").exists()
    assert "imported without their quantizer" in (tmp_path / "a" / "README.md").read_text()
    back = loaded.with_items(KEYS[:1], FEATURES[:1], titles=["back"])
    assert torch.equal(back.semantic_ids, tokenizer.semantic_ids)
    assert (back.available, back.catalogue.titles[0]) == (None, "back")


def test_what_ids_without_a_quantizer_cannot_do():
    tokenizer = imported(NONE)
    with pytest.raises(InputError, match=r"encode needs a quantizer, .* imported without one\. Fit a tokenizer"):
        tokenizer.encode(FEATURES)
    with pytest.raises(InputError, match="with_items needs a quantizer"):
        tokenizer.without_items(KEYS[:1]).with_items([KEYS[0], "new"], FEATURES[:2])
    with pytest.raises(InputError, match=r"NEAREST_FREE expected a quantizer, .* got ids alone"):
        imported(NEAREST_FREE)


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (IDS, (3, 2, 3), "level 0 expected codes in 0..2, got 0..3"),
        (IDS, (4, 2), r"\[N >= 1, 2\], got \[5, 3\]"),
        (IDS[:4], (4, 2, 3), "semantic ids of 5 catalogue items, got 4"),
        (IDS[:, :0], (), r"\[N >= 1, L >= 1\], got \[5, 0\]"),
    ],
)
def test_imported_ids_that_do_not_fit(codes, sizes, message):
    catalogue = Catalogue(KEYS[:5], [""] * 5, [""] * 5)
    for policy in (DEDUP_CODE, NONE):
        with pytest.raises(InputError, match=message):
            SemanticIdTokenizer.from_ids(codes, sizes, catalogue, collisions=policy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nearest_free_on_a_gpu():
    on_cpu = fitted(NEAREST_FREE)
    for features in (FEATURES, FEATURES.cuda(), FEATURES.numpy()):
        description = {"feature_description": {}, "dataset_manifest_hash": "d0", "collisions": NEAREST_FREE}
        rqvae = make_rqvae().cuda()
        tokenizer = SemanticIdTokenizer.fit(rqvae, features[:NUM_ITEMS], on_cpu.catalogue, **description)
        tokenizer = tokenizer.with_items(KEYS[NUM_ITEMS:], features[NUM_ITEMS:])
        assert num_distinct(tokenizer.semantic_ids) == NUM_KEYS
        agreeing = (tokenizer.semantic_ids[:NUM_ITEMS] == on_cpu.semantic_ids).all(dim=1)
        assert float(agreeing.float().mean()) > 0.9  # but for near-ties
