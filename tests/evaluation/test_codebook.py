import math

import pytest
import torch

from data.schemas import InputError
from evaluation.codebook import check_collapse, codebook_health

CODES = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 1], [1, 1], [1, 1], [2, 1], [3, 1]])


def test_statistics_by_hand():
    health = codebook_health(CODES, (4, 8))
    assert health.num_used == (4, 2)
    assert health.use == (1.0, 0.25)
    # Level 0: shares 3/8, 3/8, 1/8, 1/8. Level 1: 1/4 and 3/4.
    assert health.entropy[0] == pytest.approx(2 * 3 / 8 * math.log2(8 / 3) + 2 * 1 / 8 * 3)
    assert health.entropy[1] == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    assert health.perplexity[1] == pytest.approx(2**0.8112781)
    # Tuples: (0,0) twice, (0,1), (1,1) three times, (2,1), (3,1).
    assert (health.num_items, health.num_distinct, health.num_colliding, health.largest_group) == (8, 5, 5, 3)
    assert health.unique_ratio == 5 / 8
    assert health.collision_rate == 5 / 8


def test_one_code_has_no_entropy():
    health = codebook_health(torch.zeros(10, 1, dtype=torch.int64), (4,))
    assert health.entropy == (0.0,)
    assert math.copysign(1.0, health.entropy[0]) == 1.0
    assert health.perplexity == (1.0,)
    assert health.collision_rate == 1.0
    assert health.unique_ratio == 0.1


def test_all_distinct():
    health = codebook_health(torch.arange(16)[:, None], (16,))
    assert health.entropy == (4.0,)
    assert (health.unique_ratio, health.collision_rate, health.largest_group) == (1.0, 0.0, 1)


def test_metrics_are_flat_numbers_under_the_prefix():
    metrics = codebook_health(CODES, (4, 8)).as_metrics("valid/codebook")
    assert metrics["valid/codebook/use_level_1"] == 0.25
    assert metrics["valid/codebook/unique_ratio"] == 0.625
    assert metrics["valid/codebook/collision_rate"] == 0.625
    assert metrics["valid/codebook/largest_group"] == 3.0
    assert len(metrics) == 9
    assert all(type(value) is float for value in metrics.values())


def test_collapse_names_level_numbers_and_remedies():
    health = codebook_health(CODES, (4, 8))
    check_collapse(health, 0.25)
    with pytest.raises(InputError) as error:
        check_collapse(health, 0.5)
    message = str(error.value)
    assert "level 1 uses 2 of 8 codes (25.0%), expected at least 50.0%" in message
    for remedy in ("learning rate", "batch size", "k-means", "quantize mode", "smaller codebooks"):
        assert remedy in message


def test_few_items_cannot_fill_a_codebook():
    check_collapse(codebook_health(torch.arange(10)[:, None], (256,)), 1.0)


@pytest.mark.parametrize("min_use", [0.0, 1.5])
def test_threshold_is_a_share(min_use):
    with pytest.raises(InputError, match="min_use"):
        check_collapse(codebook_health(CODES, (4, 8)), min_use)


def test_levels_behind_one_that_tells_all_items_apart_have_nothing_to_do():
    items = torch.arange(20)
    check_collapse(codebook_health(torch.stack([items, items * 0], dim=1), (64, 64)), 0.9)
    with pytest.raises(InputError, match="level 0 uses 1 of 20 codes"):
        check_collapse(codebook_health(torch.zeros(20, 2, dtype=torch.int64), (64, 64)), 0.2)
    with pytest.raises(InputError, match="level 1 uses 1 of 20 codes"):
        check_collapse(codebook_health(torch.stack([items // 2, items * 0, items], dim=1), (64, 64, 64)), 0.2)
