"""How sure a difference between two rankers over the same users is.

Users are drawn again with replacement (Efron 1979); rankers of several seeds enter with each user's gain averaged over
the seeds. Memory stays the same whatever the number of users and draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_QUANTILES = (0.025, 0.975)
_BLOCK = 200_000
"""Numbers drawn at once: they stay in the cache."""

_USERS_PER_CLASS = 20
"""From so many users per distinct gain on, drawing how often each gain occurs is cheaper than drawing users."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of paired gains.

    Attributes:
        mean: of the first minus the second.
        low, high: 95% percentile interval of the paired bootstrap over users.
        p_value: two-sided, of the paired randomisation test: how often random signs give a mean as far from zero.
            Unlike the interval it stays honest where only a handful of users differ.
    """

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(gains_a: Tensor, gains_b: Tensor, *, num_samples: int = 10_000, seed: int = 0) -> Difference:
    """Compare two rankers over the same users.

    Args:
        gains_a: [E], or [S, E] of S seeds.
        gains_b: [E], or [S', E], of the same users in the same order.
        num_samples: draws, of the bootstrap and of the randomisation test.
        seed: of the draws; swapping the rankers turns the signs and changes nothing else.

    Raises:
        ValueError: if the users are not as many, there are none, or a gain is not finite.
    """
    first, second = averaged_over_seeds(gains_a), averaged_over_seeds(gains_b)
    if len(first) != len(second):
        raise ValueError(f"paired_bootstrap expected gains of the same users, got {len(first)} and {len(second)}.")
    differences = (first - second).numpy()
    generator = np.random.default_rng(seed)
    changed = differences[differences != 0]
    sign = -1.0 if len(changed) and changed[0] < 0 else 1.0
    means = _resampled_means(sign * differences, num_samples, generator)
    low, high = sorted(sign * np.quantile(means, _QUANTILES))
    p_value = _randomisation_test(changed, num_samples, generator)
    return Difference(float(differences.mean()), float(low) + 0.0, float(high) + 0.0, p_value)  # no -0.0


def averaged_over_seeds(gains: Tensor) -> Tensor:
    """[E] float64 on the CPU from [E] or [S, E].

    Raises:
        ValueError: for another shape, no users, or a gain that is not finite.
    """
    if gains.dim() not in (1, 2) or gains.numel() == 0:
        raise ValueError(f"expected gains [E] or [S, E] of at least one user, got shape {list(gains.shape)}.")
    averaged = gains.cpu().double()
    averaged = averaged.mean(dim=0) if averaged.dim() == 2 else averaged
    if not bool(torch.isfinite(averaged).all()):
        raise ValueError("expected finite gains, got NaN or infinity.")
    return averaged


def _resampled_means(values: np.ndarray, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """[num_samples] means of as many values, drawn with replacement.

    Zeros, which most gains and differences are, are not drawn one by one: how many others a sample has is binomial.
    """
    others = values[values != 0]
    if len(others) == 0:
        return np.zeros(num_samples)
    classes, counts = np.unique(others, return_counts=True)
    by_class = len(classes) * _USERS_PER_CLASS <= len(others)
    sums = np.empty(num_samples)
    for begin, end in _blocks(num_samples, len(classes) if by_class else len(others)):
        sizes = generator.binomial(len(values), len(others) / len(values), size=end - begin)
        if by_class:
            sums[begin:end] = generator.multinomial(sizes, counts / len(others)) @ classes
        else:
            drawn = others[generator.integers(0, len(others), size=sizes.sum(), dtype=np.int32)]
            running = np.concatenate([[0.0], np.cumsum(drawn)])
            ends = np.cumsum(sizes)
            sums[begin:end] = running[ends] - running[ends - sizes]
    return sums / len(values)


def _randomisation_test(differences: np.ndarray, num_samples: int, generator: np.random.Generator) -> float:
    """Share of draws, the observed one counted, whose sum with random signs is as far from zero (Fisher 1935)."""
    total = differences.sum()
    reached = abs(total) * (1 - 1e-9)  # equal sums differ by rounding
    extreme = 1
    for begin, end in _blocks(num_samples, len(differences)):
        positive = generator.integers(0, 2, size=(end - begin, len(differences)), dtype=np.uint8)
        extreme += int((np.abs(2 * (positive @ differences) - total) >= reached).sum())
    return extreme / (num_samples + 1)


def _blocks(num_samples: int, width: int) -> list[tuple[int, int]]:
    """Begins and ends of parts of the samples that hold about _BLOCK numbers."""
    rows = max(_BLOCK // max(width, 1), 1)
    return [(begin, min(begin + rows, num_samples)) for begin in range(0, num_samples, rows)]
