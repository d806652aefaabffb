import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
import torch

from evaluation import comparison
from evaluation.comparison import averaged_over_seeds, paired_bootstrap


def recall_gains(rate: float, num_users: int, seed: int) -> torch.Tensor:
    return (torch.rand(num_users, generator=torch.Generator().manual_seed(seed)) < rate).double()


def test_a_comparison_by_hand() -> None:
    """Two users, one better: the mean of two draws is 0, 1/2 or 1, with probabilities 1/4, 1/2, 1/4."""
    found = paired_bootstrap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), num_samples=2000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.p_value == 1.0  # with one differing user every sign is as extreme
    assert not found.excludes_zero


def test_equal_rankers_do_not_differ() -> None:
    gains = recall_gains(0.1, 500, seed=0)
    found = paired_bootstrap(gains, gains.clone())
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not found.excludes_zero


@pytest.mark.parametrize("continuous", [False, True], ids=["few distinct gains", "as many as users"])
def test_agrees_with_the_normal_interval_for_many_users(continuous: bool) -> None:
    """With both ways of drawing; the sampling error of a quantile of 20,000 draws is 2% of the width."""
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(3000, generator=generator) if continuous else recall_gains(0.30, 3000, seed=2)
    second = torch.rand(3000, generator=generator) if continuous else recall_gains(0.28, 3000, seed=3)
    differences = (first - second).double()
    found = paired_bootstrap(first, second, num_samples=20_000)
    error = float(differences.std() / math.sqrt(len(differences)))
    assert found.mean == pytest.approx(float(differences.mean()))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.06 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.06 * error)
    two_sided = 2 * NormalDist().cdf(-abs(found.mean) / error)
    assert found.p_value == pytest.approx(two_sided, abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """95% of 400 intervals, give or take three standard errors; the truth is a difference of 0.05."""
    covered = 0
    for trial in range(400):
        generator = np.random.default_rng(trial)
        better, worse = (torch.from_numpy((generator.random(300) < rate).astype(float)) for rate in (0.35, 0.30))
        found = paired_bootstrap(better, worse, num_samples=400, seed=trial)
        covered += found.low <= 0.05 <= found.high
    assert 0.95 - 0.033 < covered / 400 < 0.95 + 0.033


def test_swapping_the_rankers_turns_the_signs_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randint(0, 4, (700,), generator=generator) / 4 for _ in range(2))
    one, other = paired_bootstrap(first, second, num_samples=500), paired_bootstrap(second, first, num_samples=500)
    assert (one.mean, one.low, one.high) == (-other.mean, -other.high, -other.low)
    assert one.p_value == other.p_value


def test_the_seed_decides() -> None:
    first, second = recall_gains(0.2, 400, seed=6), torch.rand(400, generator=torch.Generator().manual_seed(7))
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    assert paired_bootstrap(first, second, seed=3) != paired_bootstrap(first, second, seed=4)


def test_seeds_are_averaged_per_user_not_counted_as_more_users() -> None:
    first, second = recall_gains(0.3, 400, seed=8), recall_gains(0.2, 400, seed=9)
    assert paired_bootstrap(first.expand(5, -1), second) == paired_bootstrap(first, second)
    torch.testing.assert_close(averaged_over_seeds(first.expand(5, -1)), first.double(), rtol=0, atol=0)


def test_a_bound_at_zero_has_no_sign() -> None:
    found = paired_bootstrap(torch.zeros(36), torch.eye(36)[0])  # one hit less
    assert (found.low < 0, math.copysign(1, found.high)) == (True, 1.0)
    assert not found.excludes_zero


def test_pairing_counts() -> None:
    """A ranker that finds all that the other finds, and 2% more, is surely better; unpaired that would drown."""
    second = recall_gains(0.5, 1000, seed=10)
    first = torch.maximum(second, recall_gains(0.04, 1000, seed=11))
    paired = paired_bootstrap(first, second)
    shuffled = paired_bootstrap(first, second[torch.randperm(1000, generator=torch.Generator().manual_seed(0))])
    assert paired.excludes_zero
    assert paired.p_value < 0.001
    assert not shuffled.excludes_zero


def test_a_handful_of_hits_is_not_significant() -> None:
    """Four of 138 users: the interval excludes zero, but four fair coins fall alike once in eight times."""
    few = torch.zeros(138, dtype=torch.float64)
    few[:4] = 1
    found = paired_bootstrap(few, torch.zeros(138))
    assert found.excludes_zero
    assert found.p_value == pytest.approx(1 / 8, abs=0.02)


def test_memory_is_bounded_for_many_users() -> None:
    """Drawn at once, 200 draws of 100,000 users would take 160 MB; all 10,000 would take 8 GB."""
    first, second = (torch.rand(100_000, generator=torch.Generator().manual_seed(seed)) for seed in (13, 14))
    tracemalloc.start()
    paired_bootstrap(first, second, num_samples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000
    blocks = comparison._blocks(10_000, 100_000)
    assert max(end - begin for begin, end in blocks) * 100_000 <= comparison._BLOCK
    assert [blocks[0][0], blocks[-1][1]] == [0, 10_000]


def test_impossible_gains_are_refused() -> None:
    with pytest.raises(ValueError, match="gains of the same users, got 3 and 2"):
        paired_bootstrap(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"at least one user, got shape \[0\]"):
        averaged_over_seeds(torch.zeros(0))
    with pytest.raises(ValueError, match="got NaN or infinity"):
        paired_bootstrap(torch.tensor([1.0, math.nan]), torch.zeros(2))
