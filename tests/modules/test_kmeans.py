import pytest
import torch
from sklearn.cluster import kmeans_plusplus
from torch.utils._python_dispatch import TorchDispatchMode

import modules.kmeans
from data.schemas import InputError
from modules.kmeans import kmeans
from modules.lloyd import nearest


def test_finds_the_means_of_separate_clusters():
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0], [10.0, 4.0]])
    centroids = kmeans(x, 2)
    assert sorted(centroids.tolist()) == [[0.0, 1.0], [10.0, 2.0]]


def test_is_deterministic_by_seed_and_leaves_the_global_generator_alone():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again, other = kmeans(x, 20, seed=3), kmeans(x, 20, seed=3), kmeans(x, 20, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_iterations_do_not_raise_the_error():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    errors = [torch.cdist(x, kmeans(x, 16, num_iterations=n)).min(dim=1).values.square().mean() for n in (0, 1, 5, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(100, 3),
        torch.zeros(1, 3),
        torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).repeat(40, 1),
        torch.full((5, 3), 1e6),
    ],
    ids=["one value", "one row", "two values", "one large value"],
)
def test_fewer_distinct_rows_than_codes(x):
    centroids = kmeans(x, 16)
    assert centroids.isfinite().all()
    assert len(centroids.unique(dim=0)) == 16
    nearest = torch.cdist(x, centroids).min(dim=1).values
    assert nearest.max() < 1e-2  # every row still has a centroid


def test_an_empty_cluster_moves_to_a_far_row(monkeypatch):
    monkeypatch.setattr("modules.kmeans._plus_plus_start", lambda x, num_codes, generator: torch.zeros(num_codes, 1))
    x = torch.cat([torch.zeros(50, 1), torch.full((50, 1), 1.0), torch.tensor([[100.0], [101.0]])])
    assert kmeans(x, 4).flatten().sort().values.tolist() == [0.0, 1.0, 100.0, 101.0]


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_memory_is_bounded():
    num_rows, num_codes, width = 30_000, 256, 16
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        kmeans(x, num_codes, num_iterations=1)
    assert largest.num_elements < num_rows * num_codes  # not even one distance per row and code at once


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor([[1.0, float("nan")]])])
def test_refuses_what_has_no_means(x):
    with pytest.raises(InputError, match="finite"):
        kmeans(x, 2)


def test_broken_rows_are_named():
    x = torch.zeros(20, 2)
    x[[3, 4], 1] = float("nan")
    with pytest.raises(InputError, match=r"got shape \[20, 2\] with 2 non-finite rows: 3, 4\. Look"):
        kmeans(x, 2)
    x[5:] = float("inf")
    with pytest.raises(InputError, match=r"17 non-finite rows: 3, 4, 5, 6, 7, \.\.\.\. Look"):
        kmeans(x, 2)


def test_the_start_is_as_good_as_that_of_scikit_learn():
    """Which takes the best of several draws as well; single draws leave about 15% more error here."""
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor(
        [
            [
                nearest(x, start).inertia()
                for start in (
                    kmeans(x, 32, num_iterations=0, seed=seed),
                    torch.from_numpy(kmeans_plusplus(x.numpy(), 32, random_state=seed)[0]),
                    torch.from_numpy(kmeans_plusplus(x.numpy(), 32, random_state=seed, n_local_trials=1)[0]),
                )
            ]
            for seed in range(10)
        ]
    )
    ours, greedy, single = errors.mean(dim=0)
    assert ours < 1.05 * greedy
    assert ours < 0.9 * single


def test_rounds_lower_the_error():
    x = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    errors = [nearest(x, kmeans(x, 64, num_iterations=100, num_rounds=rounds)).inertia() for rounds in (0, 15)]
    assert errors[1] < 0.98 * errors[0]


def test_many_rows_start_on_some_of_them(monkeypatch):
    sizes = []
    start = modules.kmeans._plus_plus_start

    def recorded(x, num_codes, generator):
        sizes.append(len(x))
        return start(x, num_codes, generator)

    monkeypatch.setattr("modules.kmeans._plus_plus_start", recorded)
    x = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    centroids = kmeans(x, 4, num_iterations=100, num_rounds=2)
    assert sizes == [16_384]
    torch.testing.assert_close(
        centroids.sort(dim=0).values, torch.tensor([[0.125], [0.375], [0.625], [0.875]]), atol=0.01, rtol=0
    )
