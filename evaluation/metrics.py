"""Item-level ranking metrics from the ranks of the targets, with 95% confidence intervals.

A rank is the 1-based place of the target in the list, 0 when the list does not contain it. With one target per user
every metric is a mean of per-user gains in [0, 1]; a target outside the list gains 0.
"""

import math

import torch
from torch import Tensor

RECALL_CUTOFFS = (1, 5, 10, 20)
NDCG_CUTOFFS = (5, 10, 20)
MRR_CUTOFFS = (20,)
METRICS = (
    *(f"recall@{cutoff}" for cutoff in RECALL_CUTOFFS),
    *(f"ndcg@{cutoff}" for cutoff in NDCG_CUTOFFS),
    *(f"mrr@{cutoff}" for cutoff in MRR_CUTOFFS),
)
LOW, HIGH = "_ci95_low", "_ci95_high"
"""Ends of the keys of an interval's bounds: `recall@10_ci95_low`."""

_Z95 = 1.959963984540054


def target_ranks(item_ids: Tensor, targets: Tensor) -> Tensor:
    """Place of each row's target in its list.

    Args:
        item_ids: [B, k] int64 items, best first, padded with -1.
        targets: [B] int64 item ids.

    Returns:
        [B] int32, 1-based; 0 where the list lacks the target.
    """
    hits = item_ids == targets.unsqueeze(1)
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1) + 1, 0).int()


def recall_gains(ranks: Tensor, cutoff: int) -> Tensor:
    """[E] float64: 1 for a target among the first `cutoff` items."""
    return _listed(ranks, cutoff).double()


def ndcg_gains(ranks: Tensor, cutoff: int) -> Tensor:
    """[E] float64: 1 / log2(1 + rank) within `cutoff`; with one target the ideal gain is 1."""
    return torch.where(_listed(ranks, cutoff), 1.0 / torch.log2(1.0 + ranks.double().clamp(min=1)), 0.0)


def mrr_gains(ranks: Tensor, cutoff: int) -> Tensor:
    """[E] float64: 1 / rank within `cutoff`."""
    return torch.where(_listed(ranks, cutoff), 1.0 / ranks.double().clamp(min=1), 0.0)


def _listed(ranks: Tensor, cutoff: int) -> Tensor:
    return (ranks >= 1) & (ranks <= cutoff)


_GAINS = {"recall": recall_gains, "ndcg": ndcg_gains, "mrr": mrr_gains}


def confidence_interval(gains: Tensor) -> tuple[float, float]:
    """95% confidence interval of the mean of gains in [0, 1], users being drawn independently.

    Wilson's score interval (Wilson 1927), with the effective sample size n m (1 - m) / s^2 for gains that are not
    0 or 1 (Dean and Pagano 2015 do so for surveys). For recall it is Wilson's interval itself. Unlike the normal
    approximation and the bootstrap it keeps its width where a small slice has no hit at all.

    Args:
        gains: [E] float64, E >= 1.
    """
    mean, size = float(gains.mean()), float(len(gains))
    variance = float(gains.var(correction=0))
    if variance > 0:
        size *= mean * (1 - mean) / variance
    z2 = _Z95**2
    centre = (mean + z2 / (2 * size)) / (1 + z2 / size)
    half = _Z95 / (1 + z2 / size) * math.sqrt(mean * (1 - mean) / size + z2 / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def ranking_metrics(ranks: Tensor, *, longest_list: int = 20) -> dict[str, float]:
    """Count, metrics and interval bounds of one slice.

    Args:
        ranks: [E] int32 as `target_ranks` gives them.
        longest_list: length of the ranked lists; metrics with a greater cutoff cannot be known and are left out.

    Returns:
        "count", and unless that is 0: each of METRICS with its `_ci95_low` and `_ci95_high`.
    """
    metrics: dict[str, float] = {"count": len(ranks)}
    if len(ranks) == 0:
        return metrics
    for metric in METRICS:
        family, cutoff = metric.split("@")
        if int(cutoff) > longest_list:
            continue
        gains = _GAINS[family](ranks, int(cutoff))
        metrics[metric] = float(gains.mean())
        metrics[metric + LOW], metrics[metric + HIGH] = confidence_interval(gains)
    return metrics


def sliced_metrics(ranks: Tensor, cold_targets: Tensor, *, longest_list: int = 20) -> dict[str, float]:
    """Metrics of the slices all, warm and cold under keys `{slice}/{metric}`.

    Args:
        ranks: [E] int32.
        cold_targets: [E] bool, true where no training range contains the target.
        longest_list: see `ranking_metrics`.
    """
    slices = {"all": ranks, "warm": ranks[~cold_targets], "cold": ranks[cold_targets]}
    return {
        f"{name}/{metric}": value
        for name, members in slices.items()
        for metric, value in ranking_metrics(members, longest_list=longest_list).items()
    }
