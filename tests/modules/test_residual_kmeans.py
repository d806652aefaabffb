import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from data.schemas import InputError
from modules.minibatch_kmeans import KmeansEffort
from modules.residual_kmeans import residual_kmeans
from ops import residual_quantize

STREAMED = KmeansEffort(memory_rows=400, batch_rows=128)
"""A matrix of more than 400 rows is streamed."""

WITH_FULL_SAMPLE = KmeansEffort(memory_rows=16 * 256, batch_rows=1024)
"""A sample of as many rows per code as there always are where memory allows; more rows are streamed."""


def rows_of(num_rows, width=6):
    return np.random.default_rng(0).standard_normal((num_rows, width)).astype(np.float32)


def error(features, codebooks):
    return float(residual_quantize(torch.from_numpy(features), codebooks)[1].square().sum())


def greedy_residual(features, codebook_sizes, seed):
    """The same by scikit-learn: k-means of what the levels before left over."""
    residual, codebooks = features, []
    for size in codebook_sizes:
        found = KMeans(size, n_init=1, random_state=seed).fit(residual)
        codebooks.append(torch.from_numpy(found.cluster_centers_))
        residual = residual - found.cluster_centers_[found.labels_]
    return codebooks


@pytest.mark.parametrize("effort", [KmeansEffort(), STREAMED], ids=["in memory", "streamed"])
def test_two_levels_of_a_grid_are_found_exactly(effort):
    coarse, fine = np.meshgrid([0.0, 100.0, 200.0], [-1.0, 0.0, 1.0])
    features = np.tile((coarse + fine).reshape(-1, 1), (100, 1)).astype(np.float32)
    first, second = residual_kmeans(features, (3, 3), effort=effort)
    torch.testing.assert_close(first.sort(dim=0).values, torch.tensor([[0.0], [100.0], [200.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(second.sort(dim=0).values, torch.tensor([[-1.0], [0.0], [1.0]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("effort", [KmeansEffort(), WITH_FULL_SAMPLE], ids=["in memory", "streamed"])
def test_error_is_within_one_percent_of_scikit_learn_level_by_level(effort):
    features, sizes = rows_of(9000), (16, 8, 12)
    ours = [residual_kmeans(features, sizes, effort=effort, seed=seed) for seed in range(3)]
    theirs = [greedy_residual(features, sizes, seed) for seed in range(3)]
    assert [tuple(codebook.shape) for codebook in ours[0]] == [(16, 6), (8, 6), (12, 6)]
    for levels in (1, 2, 3):
        means = [np.mean([error(features, codebooks[:levels]) for codebooks in found]) for found in (ours, theirs)]
        assert means[0] <= 1.01 * means[1]


def test_the_same_seed_gives_the_same_codebooks():
    features = rows_of(900)
    first, again, other = (residual_kmeans(features, (5, 5), effort=STREAMED, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not first[0].equal(other[0])


@pytest.mark.parametrize("num_rows", [20, 900])
def test_an_encoder_comes_before_the_codebooks(num_rows):
    features = rows_of(num_rows)
    encoded = residual_kmeans(features, (4, 3), transform=lambda rows: 2 * rows[:, :3], effort=STREAMED)
    torch.testing.assert_close(encoded, residual_kmeans(2 * features[:, :3], (4, 3), effort=STREAMED))


@pytest.mark.parametrize("num_rows", [1, 5, 900])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_features_and_fewer_rows_than_codes(num_rows, value):
    features = np.full((num_rows, 3), value, dtype=np.float32)
    codebooks = residual_kmeans(features, (8, 8), effort=STREAMED)
    assert [len(codebook.unique(dim=0)) for codebook in codebooks] == [8, 8]
    assert error(features, codebooks) < 1e-4


@pytest.mark.parametrize("num_rows", [20, 900])
def test_a_broken_row_is_named(num_rows):
    features = rows_of(num_rows)
    features[11] = -math.inf
    with pytest.raises(InputError, match="NaN or infinity in row 11"):
        residual_kmeans(features, (4, 4), effort=STREAMED)


@pytest.mark.parametrize("sizes", [(), (4, 0)])
def test_refuses_levels_without_codes(sizes):
    with pytest.raises(InputError, match="codebook_sizes of at least 1 per level, got"):
        residual_kmeans(rows_of(10), sizes)
