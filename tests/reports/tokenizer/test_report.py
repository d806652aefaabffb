import json
import re

import numpy as np
import pytest
import torch

from data.schemas import InputError
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from reports.tokenizer.report import write_tokenizer_report
from tests.reports.tokenizers import WIDTH, catalogue_of, clustered_features, fitted, residual_kmeans_rqvae

GROUPS = 8
CATEGORIES = [f"Shop > Group {item % GROUPS}" for item in range(240)]


def report(folder, tokenizer, features, **options):
    """The page and the numbers beside it."""
    page = write_tokenizer_report(folder / "report", tokenizer, features, **options)
    assert page == folder / "report" / "index.html"
    return page.read_text(encoding="utf-8"), json.loads((folder / "report" / "metrics.json").read_text())


def status_of(numbers, name):
    (check,) = [check for check in numbers["verdict"]["checks"] if check["name"] == name]
    return check["status"]


def section(page, name):
    return re.search(rf'<section id="{name}".*?</section>', page, flags=re.DOTALL)[0]


def test_a_healthy_tokenizer(tmp_path):
    features = clustered_features()
    tokenizer = fitted(features, sizes=(8, 16, 16, 16), categories=CATEGORIES)
    page, numbers = report(tmp_path, tokenizer, features)
    assert numbers["verdict"]["status"] == "good", numbers["verdict"]["summary"]
    assert '<h2>Healthy</h2><p class="summary">All 11 checks pass; nothing needs to change.</p>' in page
    assert "What to change" not in page
    assert {check["advice"] for check in numbers["verdict"]["checks"]} == {""}
    assert numbers["before_policy"]["num_distinct"] == len(torch.unique(tokenizer.codes, dim=0))
    assert numbers["after_policy"]["num_distinct"] == 240
    assert numbers["prefix_purity"][0]["share"] > 0.9
    assert numbers["prefix_purity"][0]["chance"] == pytest.approx(29 / 239)
    assert numbers["features"]["reproduced"] == 1.0
    assert numbers["features"]["reconstruction"]["explained"] > 0.9
    assert numbers["features"]["reconstruction"]["unquantized"] == 0.0
    assert [sum(counts) for counts in numbers["code_counts"]] == [240] * 4
    assert len(numbers["sample_items"]) == 10
    assert all(len(sample["by_ids"]) == len(sample["by_features"]) == 8 for sample in numbers["sample_items"])


def test_neighbours_by_ids_share_the_longest_prefixes(tmp_path):
    features = clustered_features()
    tokenizer = fitted(features)
    rows = {key: row for row, key in enumerate(tokenizer.catalogue.item_keys)}
    _, numbers = report(tmp_path, tokenizer, features)
    for sample in numbers["sample_items"]:
        item = rows[sample["item_key"]]
        shared = (tokenizer.codes == tokenizer.codes[item]).long().cumprod(dim=1).sum(dim=1)
        shared[item] = -1
        assert [near["num_shared"] for near in sample["by_ids"]] == shared.sort(descending=True).values[:8].tolist()
        assert sample["item_key"] not in [near["item_key"] for near in sample["by_ids"] + sample["by_features"]]
        cosines = torch.cosine_similarity(features, features[item : item + 1])
        cosines[item] = -2
        wanted = cosines.sort(descending=True).values[:8].tolist()
        assert [near["cosine"] for near in sample["by_features"]] == pytest.approx(wanted, abs=1e-5)


def test_without_features_the_page_says_so(tmp_path):
    tokenizer = fitted(clustered_features(), categories=CATEGORIES)
    page, numbers = report(tmp_path, tokenizer, None)
    assert numbers["features"] is None
    assert "Not available: no features given." in section(page, "reconstruction")
    assert "Not available: no features given." in section(page, "meaning")
    assert status_of(numbers, "Reconstruction") == "unknown"
    assert status_of(numbers, "Prefixes and categories") == "good"
    assert "5 checks could not be made" in numbers["verdict"]["summary"]
    assert numbers["groups"][0]["num_distinct_features"] is None


def test_imported_ids_without_a_quantizer(tmp_path):
    features = clustered_features()
    codes = fitted(features).codes
    tokenizer = SemanticIdTokenizer.from_ids(codes, (8, 8, 8), catalogue_of(240))
    page, numbers = report(tmp_path, tokenizer, features)
    assert not numbers["has_quantizer"]
    assert "Not available: the ids were imported and have no quantizer." in section(page, "reconstruction")
    assert status_of(numbers, "Neighbours in features and ids") == "good"
    assert status_of(numbers, "Ids fit the features") == "unknown"
    assert "imported, without quantizer" in section(page, "facts")
    for sample in numbers["sample_items"]:  # among equally long prefixes by item id
        order = [(-near["num_shared"], int(near["item_key"].removeprefix("key-"))) for near in sample["by_ids"]]
        assert order == sorted(order)


@pytest.mark.parametrize("policy", list(CollisionPolicy))
def test_every_policy_before_and_after(tmp_path, policy):
    features = clustered_features()
    tokenizer = fitted(features, policy=policy)
    page, numbers = report(tmp_path, tokenizer, features)
    distinct = len(torch.unique(tokenizer.nearest_codes, dim=0))
    assert distinct < 240
    assert numbers["collision_policy"] == policy.value
    assert numbers["before_policy"]["num_distinct"] == distinct
    assert f"Policy {policy.value}:" in section(page, "collisions")
    after = numbers["after_policy"]
    assert after["num_distinct"] == (distinct if policy is CollisionPolicy.NONE else 240)
    assert after["num_colliding"] == (
        numbers["before_policy"]["num_colliding"] if distinct == after["num_distinct"] else 0
    )
    assert after["num_moved"] == (240 - distinct if policy is CollisionPolicy.NEAREST_FREE else 0)
    assert (after["dedup_capacity"] is None) == (policy is not CollisionPolicy.DEDUP_CODE)
    assert numbers["features"]["reproduced"] == 1.0
    assert (numbers["features"]["nearest_error"] is None) == (policy is not CollisionPolicy.NEAREST_FREE)
    largest = numbers["groups"][0]
    assert len(largest["item_keys"]) == largest["num_items"] == numbers["before_policy"]["largest_group"] > 1
    for key in largest["item_keys"]:
        item = tokenizer.catalogue.item_keys.index(key)
        assert tokenizer.nearest_codes[item].tolist() == largest["codes"]


def test_moving_items_costs_reconstruction(tmp_path):
    features = clustered_features()
    _, numbers = report(tmp_path, fitted(features, policy=CollisionPolicy.NEAREST_FREE), features)
    assert numbers["features"]["nearest_error"] < numbers["features"]["reconstruction"]["error"]


def test_one_item(tmp_path):
    features = clustered_features(1)
    page, numbers = report(tmp_path, fitted(features, sizes=(4, 2)), features)
    assert numbers["verdict"]["headline"] == "Too few items to judge"
    assert "What to change" not in page
    assert "one item has no neighbours" in section(page, "meaning")
    assert numbers["sample_items"] == []
    assert "No two items share their codes." in section(page, "collisions")


def test_identical_features_are_named_as_the_cause(tmp_path):
    features = torch.ones(60, WIDTH)
    _, numbers = report(tmp_path, fitted(features, rqvae=residual_kmeans_rqvae(clustered_features())), features)
    assert numbers["verdict"]["status"] == "bad"
    (bad,) = [check for check in numbers["verdict"]["checks"] if check["status"] == "bad"]
    assert (bad["name"], bad["measured"]) == ("Features", "1 different rows of 60 (1.7%)")
    assert numbers["unique_ratio_ceiling"] == pytest.approx(1 / 60)
    assert numbers["groups"][0]["num_distinct_features"] == 1
    assert numbers["features"]["reconstruction"]["explained"] is None


def test_a_collapsed_codebook_is_found(tmp_path):
    features = clustered_features()
    rqvae = residual_kmeans_rqvae(features)
    with torch.no_grad():
        weight = next(rqvae.quantizers[1].parameters())
        weight[1:] = 1e6  # far from everything
    page, numbers = report(tmp_path, fitted(features, rqvae=rqvae), features)
    assert numbers["verdict"]["status"] == "bad"
    assert numbers["before_policy"]["num_used"][1] == 1
    assert status_of(numbers, "Codes in use") == "bad"
    assert "12.5% at the worst level (1: 1 of 8)" in page
    assert "Level 1 has 7 codes without an item." in section(page, "verdict")


def test_features_of_another_encoder_are_found(tmp_path):
    tokenizer = fitted(clustered_features())
    _, numbers = report(tmp_path, tokenizer, clustered_features(seed=1))
    assert status_of(numbers, "Ids fit the features") == "bad"


def test_other_categories_can_be_given(tmp_path):
    features = clustered_features()
    tokenizer = fitted(features, categories=CATEGORIES)
    _, whole = report(tmp_path, tokenizer, None)
    _, coarse = report(tmp_path, tokenizer, None, categories=["Shop"] * 240)
    assert whole["num_categories"] == GROUPS
    assert coarse["num_categories"] == 1
    assert coarse["prefix_purity"][0]["share"] == 1.0
    assert status_of(coarse, "Prefixes and categories") == "unknown"


def test_a_huge_group_is_counted_and_its_beginning_listed(tmp_path):
    codes = torch.zeros(5000, 2, dtype=torch.int64)
    tokenizer = SemanticIdTokenizer.from_ids(codes, (4, 4), catalogue_of(5000), collisions=CollisionPolicy.NONE)
    page, numbers = report(tmp_path, tokenizer, None)
    (group,) = numbers["groups"]
    assert (group["num_items"], len(group["item_keys"])) == (5000, 100)
    assert "and 4,990 more" in section(page, "collisions")
    assert numbers["verdict"]["status"] == "bad"


def test_hostile_titles_stay_text(tmp_path):
    hostile = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> {{data}} \\1"
    features = clustered_features(40)
    tokenizer = fitted(features, sizes=(2, 2), titles=[hostile] * 40, categories=[hostile] * 40)
    page, _ = report(tmp_path, tokenizer, features, title=hostile)
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>&lt;/script&gt;" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    assert json.loads(data)["titles"] == [hostile] * 40


def test_the_page_asks_nothing_of_a_network(tmp_path):
    page, _ = report(tmp_path, fitted(clustered_features(40), sizes=(2, 2)), None)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\(", page)


def test_large_catalogues_are_sampled_and_that_is_said(tmp_path):
    features = clustered_features().numpy()
    tokenizer = fitted(torch.from_numpy(features))
    page, numbers = report(tmp_path, tokenizer, features, max_feature_rows=100, max_tree_items=50)
    assert numbers["features"]["num_read"] == 100
    assert numbers["unique_ratio_ceiling"] is None
    assert "Of a random 100 of 240 items." in section(page, "reconstruction")
    assert "A random 50 of 240 items; counts are of these." in section(page, "prefixes")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert len(data["keys"]) == 50
    assert len(data["codes"]) == 50 * 4
    assert data["codes"][:4] == tokenizer.semantic_ids[int(data["keys"][0].removeprefix("key-"))].tolist()


def test_sampled_rows_keep_their_items(tmp_path):
    """A memory map is read row by row, and each row is compared with its own item's codes."""
    features = clustered_features()
    np.save(tmp_path / "features.npy", features.numpy().astype(np.float32))
    stored = np.load(tmp_path / "features.npy", mmap_mode="r")
    _, numbers = report(tmp_path, fitted(features), stored, max_feature_rows=64)
    assert numbers["features"]["reproduced"] == 1.0


def test_training_curves(tmp_path):
    log = tmp_path / "metrics.jsonl"
    records = [{"step": step, "train/loss": 1 / step, "codebook/use_level_0": 0.5} for step in range(1, 6)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    page, _ = report(tmp_path, fitted(clustered_features(40), sizes=(2, 2)), None, metrics_log=log)
    drawn = section(page, "training")
    assert re.findall("<figcaption>([^<]*)</figcaption>", drawn) == ["loss", "use"]
    assert 'href="#training"' in page
    log.write_text("")
    page, _ = report(tmp_path, fitted(clustered_features(40), sizes=(2, 2)), None, metrics_log=log)
    assert "The log holds no curves yet." in section(page, "training")
    page, _ = report(tmp_path, fitted(clustered_features(40), sizes=(2, 2)), None)
    assert "#training" not in page


def test_removed_items_are_counted(tmp_path):
    tokenizer = fitted(clustered_features(40), sizes=(2, 2)).without_items(["key-3"])
    page, numbers = report(tmp_path, tokenizer, None)
    assert numbers["num_removed"] == 1
    assert "40 items, 1 of them removed" in page


def test_a_reloaded_artifact_gives_the_same_report(tmp_path):
    features = clustered_features()
    tokenizer = fitted(features, policy=CollisionPolicy.NEAREST_FREE, categories=CATEGORIES)
    tokenizer.save_pretrained(tmp_path / "artifact")
    _, before = report(tmp_path, tokenizer, features)
    _, after = report(tmp_path, SemanticIdTokenizer.from_pretrained(tmp_path / "artifact"), features)
    assert after == before


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(39, WIDTH), r"expected features of shape \[40, 6\], got \[39, 6\]"),
        (torch.zeros(40, WIDTH + 1), r"expected features of shape \[40, 6\], got \[40, 7\]"),
        (torch.zeros(40), r"expected features of shape \[40, 6\], got \[40\]"),
        (torch.zeros(40, WIDTH).index_fill(0, torch.tensor([7]), float("nan")), r"row 7 \(item 'key-7'\)"),
        (torch.zeros(40, WIDTH).index_fill(0, torch.tensor([8]), float("inf")), r"row 8 \(item 'key-8'\)"),
    ],
)
def test_bad_features_leave_no_report(tmp_path, features, message):
    tokenizer = fitted(clustered_features(40), sizes=(2, 2))
    with pytest.raises(InputError, match=message):
        report(tmp_path, tokenizer, features)
    assert not (tmp_path / "report").exists()


def test_other_bad_input(tmp_path):
    tokenizer = fitted(clustered_features(40), sizes=(2, 2))
    with pytest.raises(InputError, match="for 3 categories"):
        report(tmp_path, tokenizer, None, categories=["a"] * 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        write_tokenizer_report(tmp_path / "file", tokenizer, None)
    with pytest.raises(InputError, match=r"none.jsonl does not exist"):
        report(tmp_path, tokenizer, None, metrics_log=tmp_path / "none.jsonl")
