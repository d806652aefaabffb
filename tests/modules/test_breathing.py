import torch

from modules.breathing import _shrink, _two_nearest, breathe
from modules.lloyd import lloyd, nearest


def blobs(num_blobs, rows_per_blob=20, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(num_blobs, 1, width, generator=generator)
    return (centres + 0.1 * torch.randn(num_blobs, rows_per_blob, width, generator=generator)).flatten(0, 1)


def breathed(x, clusters, num_rounds=15):
    return breathe(x, clusters, num_rounds=num_rounds, generator=torch.Generator().manual_seed(0))


def test_leaves_a_local_optimum_where_two_blobs_share_a_centroid():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0], [101.0]])
    stuck = lloyd(x, torch.tensor([[5.5], [100.0], [101.0]]), num_iterations=50)
    assert stuck.inertia() == 101.0  # Lloyd's algorithm ends where it began
    clusters = breathed(x, stuck)
    assert clusters.centroids.sort(dim=0).values.tolist() == [[0.5], [10.5], [100.5]]
    assert clusters.inertia() == 1.5


def test_finds_every_blob_from_a_start_in_one_of_them():
    x = blobs(32)
    stuck = lloyd(x, x[:32], num_iterations=50)
    best = lloyd(x, x.unflatten(0, (32, 20)).mean(dim=1), num_iterations=50)
    clusters = breathed(x, stuck)
    assert stuck.inertia() > 20 * best.inertia()
    assert clusters.inertia() < 1.01 * best.inertia()


def test_clusters_that_come_back_agree_with_their_centroids_and_are_never_worse():
    x = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    for num_codes in (1, 2, 3, 40):
        before = lloyd(x, x[:num_codes], num_iterations=50)
        after = breathed(x, before)
        assert after.centroids.shape == (num_codes, 3)
        assert after.inertia() <= before.inertia()
        assert after.codes.equal(nearest(x, after.centroids).codes)


def test_no_rounds_change_nothing():
    x = blobs(3)
    before = nearest(x, x[:3])
    assert breathed(x, before, num_rounds=0).centroids.equal(before.centroids)


def test_clusters_without_error_stay():
    x = torch.ones(10, 2)
    before = nearest(x, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert breathed(x, before).centroids.equal(before.centroids)


def test_the_two_nearest_by_hand():
    codes, next_codes, loss = _two_nearest(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0], [10.0]]))
    assert codes.tolist() == [0, 1]
    assert next_codes.tolist() == [1, 0]
    assert loss.tolist() == [8.0, 8.0]


def test_of_two_close_centroids_only_one_goes():
    x = torch.tensor([[0.0], [0.25], [5.0], [6.0], [50.0], [50.5]])
    centroids = torch.tensor([[0.0], [0.25], [5.0], [6.0], [50.0], [50.5]])
    assert _shrink(x, centroids, 5).tolist() == [[0.25], [5.0], [6.0], [50.0], [50.5]]
    kept = _shrink(x, centroids, 3).flatten()
    assert [int(((kept - middle).abs() < 3).sum()) for middle in (0.0, 5.5, 50.0)] == [1, 1, 1]
