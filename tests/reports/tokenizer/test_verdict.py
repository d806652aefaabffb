from dataclasses import replace

import pytest
import torch

from evaluation.reconstruction import Reconstruction
from evaluation.semantic_ids import NeighbourAgreement, Purity
from modules.tokenizer.collisions import CodebookHealth
from modules.tokenizer.policies import CollisionPolicy
from reports.tokenizer.checks import Status, Threshold
from reports.tokenizer.measures import FeatureMeasures, Group, Measures
from reports.tokenizer.verdict import judge

NUM_ITEMS = 10_000
HEALTH = CodebookHealth(
    num_items=NUM_ITEMS,
    codebook_sizes=(256, 256),
    num_used=(256, 250),
    entropy=(7.9, 7.8),
    num_distinct=9_900,
    num_colliding=190,
    largest_group=6,
)
RECONSTRUCTION = Reconstruction(
    errors=torch.full((NUM_ITEMS,), 0.4),
    variance=1.0,
    unquantized=0.3,
    latent_variance=1.0,
    latent_residual=(0.5, 0.3),
)
FEATURES = FeatureMeasures(
    rows=torch.arange(NUM_ITEMS),
    values=torch.zeros(NUM_ITEMS, 1),
    num_distinct=9_950,
    reproduced=1.0,
    agreement=NeighbourAgreement(
        num_neighbours=10,
        num_sampled=1000,
        overlap=0.2,
        overlap_chance=0.001,
        by_depth=(0.6, 0.1),
        chance_by_depth=(0.005, 0.0),
    ),
    reconstruction=RECONSTRUCTION,
    error_histogram=None,
    worst=(),
    nearest_error=None,
)
HEALTHY = Measures(
    num_items=NUM_ITEMS,
    num_removed=0,
    language="text",
    has_quantizer=True,
    policy=CollisionPolicy.DEDUP_CODE,
    codebook_sizes=(256, 256),
    nearest=HEALTH,
    final=replace(HEALTH, num_distinct=NUM_ITEMS, num_colliding=0, largest_group=1),
    num_moved=0,
    dedup_capacity=256,
    code_counts=((100,), (100,)),
    num_groups=90,
    groups=(Group(codes=(1, 2), item_ids=(1, 2, 3, 4, 5, 6), num_distinct_features=6),),
    purity=(Purity(depth=1, share=0.4, num_items=NUM_ITEMS, num_prefixes=256, chance=0.02),),
    num_categories=100,
    features=FEATURES,
)


def _all_distinct(num_items):
    return replace(HEALTH, num_items=num_items, num_distinct=num_items, num_colliding=0, largest_group=1)


def with_health(**changes):
    """Before the policy."""
    return replace(HEALTHY, nearest=replace(HEALTH, **changes))


def with_features(**changes):
    return replace(HEALTHY, features=replace(FEATURES, **changes))


def with_reconstruction(**changes):
    return with_features(reconstruction=replace(RECONSTRUCTION, **changes))


def with_agreement(*by_depth):
    return with_features(agreement=replace(FEATURES.agreement, by_depth=by_depth))


def with_purity(share, chance):
    return replace(HEALTHY, purity=(replace(HEALTHY.purity[0], share=share, chance=chance),))


def failed(measures):
    return {check.name: check.status for check in judge(measures).to_change}


def test_all_is_well():
    verdict = judge(HEALTHY)
    assert (verdict.status, verdict.headline) == (Status.GOOD, "Healthy")
    assert verdict.summary == "All 11 checks pass; nothing needs to change."
    assert verdict.to_change == []


@pytest.mark.parametrize(
    ("measures", "name", "status"),
    [
        (with_health(num_used=(256, 240)), "Codes in use", Status.WARN),
        (with_health(num_used=(100, 250)), "Codes in use", Status.BAD),
        (with_health(entropy=(7.9, 5.0)), "Codes evenly used", Status.WARN),
        (with_health(entropy=(3.9, 7.9)), "Codes evenly used", Status.BAD),
        (with_health(num_distinct=9_500), "Unique before the policy", Status.WARN),
        (with_health(num_distinct=7_000), "Unique before the policy", Status.BAD),
        (with_health(largest_group=11), "Largest collision group", Status.WARN),
        (with_health(largest_group=101), "Largest collision group", Status.BAD),
        (replace(HEALTHY, dedup_capacity=7), "After the policy", Status.WARN),
        (replace(HEALTHY, final=HEALTH), "After the policy", Status.BAD),
        (
            replace(HEALTHY, policy=CollisionPolicy.NONE, final=HEALTH, dedup_capacity=None),
            "After the policy",
            Status.WARN,
        ),
        (
            replace(HEALTHY, policy=CollisionPolicy.NEAREST_FREE, dedup_capacity=None, num_moved=600),
            "After the policy",
            Status.WARN,
        ),
        (
            replace(HEALTHY, policy=CollisionPolicy.NEAREST_FREE, dedup_capacity=None, num_moved=2_100),
            "After the policy",
            Status.BAD,
        ),
        (with_features(reproduced=0.9), "Ids fit the features", Status.WARN),
        (with_features(reproduced=0.1), "Ids fit the features", Status.BAD),
        (with_reconstruction(errors=torch.full((10,), 0.8)), "Reconstruction", Status.WARN),
        (with_reconstruction(errors=torch.full((10,), 2.0)), "Reconstruction", Status.BAD),
        (with_reconstruction(latent_residual=(0.5, 0.49)), "Every level adds", Status.WARN),
        (with_reconstruction(latent_residual=(0.5, 0.6)), "Every level adds", Status.BAD),
        (with_purity(0.1, 0.02), "Prefixes and categories", Status.WARN),
        (with_purity(0.03, 0.02), "Prefixes and categories", Status.BAD),
        (with_agreement(0.2, 0.1), "Neighbours in features and ids", Status.WARN),
        (with_agreement(0.05, 0.01), "Neighbours in features and ids", Status.BAD),
    ],
)
def test_every_check_can_fail_alone(measures, name, status):
    assert failed(measures) == {name: status}
    verdict = judge(measures)
    assert verdict.status is status
    assert name.lower() in verdict.summary
    assert all(check.advice for check in verdict.to_change)


def test_identical_features_lower_the_ceiling_and_not_the_mark():
    """With 5,000 different rows no ids can be more unique; that is the features' fault alone."""
    measures = with_features(num_distinct=4_900)
    assert failed(replace(measures, nearest=replace(HEALTH, num_distinct=4_850))) == {"Features": Status.BAD}
    sample = replace(measures, features=replace(measures.features, rows=torch.arange(9_000)))
    assert "Unique before the policy" in failed(replace(sample, nearest=replace(HEALTH, num_distinct=4_850)))


def test_a_large_catalogue_has_no_large_groups():
    large = replace(with_health(num_items=1_000_000, num_distinct=990_000, largest_group=51), num_items=1_000_000)
    assert failed(replace(large, final=_all_distinct(1_000_000), features=None)) == {
        "Largest collision group": Status.WARN
    }


def test_a_smaller_codebook_is_advised_only_where_it_is_smaller():
    few = judge(with_health(num_used=(40, 250), entropy=(4.5, 7.8))).to_change[0].advice
    many = judge(with_health(num_used=(240, 250))).to_change[0].advice
    assert "32 codes would hold what it says" in few
    assert "smaller" not in many


def test_the_worst_comes_first():
    measures = replace(with_health(num_used=(256, 240)), features=replace(FEATURES, reproduced=0.1))
    assert list(failed(measures)) == ["Ids fit the features", "Codes in use"]
    assert judge(measures).summary.startswith("Do not train a recommender on these ids yet. Failed: ids fit")


def test_what_cannot_be_asked_is_unknown():
    bare = replace(HEALTHY, features=None, purity=())
    verdict = judge(bare)
    assert verdict.status is Status.GOOD
    assert verdict.summary == "All 5 checks pass; nothing needs to change. 6 checks could not be made."
    unknown = [check.measured for check in verdict.checks if check.status is Status.UNKNOWN]
    assert set(unknown) == {"not available: no features given", "not available: no categories"}


def test_small_catalogues_get_no_verdict():
    verdict = judge(replace(with_health(num_items=31, num_used=(1, 1)), num_items=31))
    assert (verdict.status, verdict.headline) == (Status.UNKNOWN, "Too few items to judge")
    assert verdict.to_change == []


def test_few_items_cannot_fill_a_codebook():
    few = replace(HEALTH, num_items=100, num_used=(98, 97), entropy=(6.5, 6.5), num_distinct=100, num_colliding=0)
    measures = replace(HEALTHY, num_items=100, nearest=few, final=_all_distinct(100), features=None)
    assert failed(measures) == {}


def test_advice_knows_where_the_loss_is():
    coder = judge(with_reconstruction(errors=torch.full((10,), 0.85), unquantized=0.8)).to_change[0].advice
    codes = judge(with_reconstruction(errors=torch.full((10,), 0.85), unquantized=0.1)).to_change[0].advice
    assert "Most is lost in the autoencoder" in coder
    assert "Most is lost in the codes" in codes


def test_imported_ids_get_no_advice_on_a_quantizer():
    measures = replace(with_health(num_used=(100, 250)), has_quantizer=False)
    assert "imported" in judge(measures).to_change[0].advice


def test_a_threshold_states_itself():
    threshold = Threshold(0.95, 0.5)
    assert [threshold.status(value) for value in (0.95, 0.94, 0.5, 0.49)] == [
        *(Status.GOOD, Status.WARN, Status.WARN, Status.BAD),
    ]
    assert threshold.words("every level") == "every level at least 95%; below 50% is bad"
