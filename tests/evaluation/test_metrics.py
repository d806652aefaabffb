import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from evaluation.metrics import METRICS, confidence_interval, ranking_metrics, sliced_metrics, target_ranks


def test_target_ranks_are_one_based_and_zero_outside_the_list():
    item_ids = torch.tensor([[4, 7, 2], [7, 4, -1], [1, 0, 3]])
    ranks = target_ranks(item_ids, torch.tensor([4, 4, 9]))
    torch.testing.assert_close(ranks, torch.tensor([1, 2, 0], dtype=torch.int32))


def test_metrics_of_four_users_by_hand():
    metrics = ranking_metrics(torch.tensor([1, 3, 0, 12], dtype=torch.int32))
    expected = {
        "count": 4,
        "recall@1": 0.25,
        "recall@5": 0.5,
        "recall@10": 0.5,
        "recall@20": 0.75,
        "ndcg@5": (1 + 0.5) / 4,  # 1/log2(2) and 1/log2(4)
        "ndcg@10": (1 + 0.5) / 4,
        "ndcg@20": (1 + 0.5 + 0.27023815442731974) / 4,  # 1/log2(13)
        "mrr@20": (1 + 1 / 3 + 1 / 12) / 4,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


def test_metrics_agree_with_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 60, generator=generator)  # distinct scores: torchmetrics has no tie rule
    targets = torch.randint(60, (50,), generator=generator)
    ranks = target_ranks(scores.argsort(dim=1, descending=True)[:, :20], targets)
    relevant = torch.zeros(50, 60, dtype=torch.bool).scatter_(1, targets[:, None], True)
    users = torch.arange(50)[:, None].expand(50, 60)
    metrics = ranking_metrics(ranks)
    oracles = {"recall": RetrievalRecall, "ndcg": RetrievalNormalizedDCG, "mrr": RetrievalMRR}
    for metric in METRICS:
        family, cutoff = metric.split("@")
        oracle = oracles[family](top_k=int(cutoff))
        expected = oracle(scores.flatten(), relevant.flatten(), indexes=users.flatten())
        assert metrics[metric] == pytest.approx(float(expected), abs=1e-6), metric
    assert 0 < metrics["recall@1"] < metrics["recall@20"] < 1


def test_interval_of_a_proportion_is_wilsons():
    gains = torch.cat([torch.ones(10), torch.zeros(90)]).double()
    assert confidence_interval(gains) == pytest.approx((0.0552291, 0.1743657), abs=1e-6)


def test_interval_without_a_hit_still_has_width():
    low, high = confidence_interval(torch.zeros(138, dtype=torch.float64))
    assert low == 0.0
    assert high == pytest.approx(3.841459 / (138 + 3.841459), abs=1e-6)


def test_interval_of_graded_gains_approaches_the_normal_one():
    gains = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double()
    low, high = confidence_interval(gains)
    half = 1.959964 * float(gains.std()) / math.sqrt(20_000)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(float(gains.mean()), abs=1e-4)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_interval_covers_the_truth_nineteen_times_of_twenty(rate: float):
    generator = torch.Generator().manual_seed(2)
    samples = torch.rand(1000, 300, generator=generator) < rate
    gains = samples * torch.randint(1, 3, samples.shape, generator=generator) / 2  # a half or a whole
    intervals = [confidence_interval(sample.double()) for sample in gains]
    covered = sum(low <= rate * 0.75 <= high for low, high in intervals) / len(intervals)
    assert 0.93 <= covered <= 0.975


def test_an_empty_slice_has_a_count_and_nothing_else():
    metrics = sliced_metrics(torch.tensor([1, 0], dtype=torch.int32), torch.tensor([False, False]))
    assert [key for key in metrics if key.startswith("cold/")] == ["cold/count"]
    assert metrics["cold/count"] == 0
    assert metrics["warm/recall@1"] == 0.5


def test_slices_divide_the_users():
    ranks = torch.tensor([1, 2, 0, 4], dtype=torch.int32)
    metrics = sliced_metrics(ranks, torch.tensor([False, True, True, False]))
    assert [metrics[f"{name}/count"] for name in ("all", "warm", "cold")] == [4, 2, 2]
    assert metrics["warm/recall@5"] == 1.0
    assert metrics["cold/recall@5"] == 0.5
    assert metrics["all/recall@5"] == 0.75


def test_metrics_beyond_the_lists_length_are_left_out():
    metrics = ranking_metrics(torch.tensor([1, 7], dtype=torch.int32), longest_list=10)
    assert metrics["recall@10"] == 1.0
    assert not any(key.split("@")[-1].startswith("20") for key in metrics)
