import pytest
import torch

from modules.lloyd import lloyd, move_to_means, nearest

LINE = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0], [11.0]])


def test_clusters_by_hand():
    clusters = nearest(LINE, torch.tensor([[1.0], [9.0]]))
    assert clusters.codes.tolist() == [0, 0, 0, 1, 1, 1]
    assert clusters.distance.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 4.0]
    assert clusters.inertia() == 7.0


@pytest.mark.parametrize(
    ("num_iterations", "expected"), [(0, [[0.0], [2.0]]), (1, [[0.5], [8.0]]), (9, [[1.0], [10.0]])]
)
def test_steps_by_hand(num_iterations, expected):
    clusters = lloyd(LINE, torch.tensor([[0.0], [2.0]]), num_iterations=num_iterations)
    assert clusters.centroids.tolist() == expected
    again = nearest(LINE, clusters.centroids)
    assert clusters.codes.equal(again.codes)
    assert clusters.distance.equal(again.distance)


def test_a_tolerance_ends_it_early():
    clusters = lloyd(LINE, torch.tensor([[0.0], [2.0]]), num_iterations=9, tolerance=1.0)
    assert clusters.centroids.tolist() == [[0.5], [8.0]]


def test_centroids_without_rows_go_to_the_far_rows_in_turn():
    moved = move_to_means(
        counts=torch.tensor([2, 0, 0, 0]),
        sums=torch.tensor([[4.0], [0.0], [0.0], [0.0]]),
        centroids=torch.tensor([[0.0], [5.0], [6.0], [7.0]]),
        far_rows=torch.tensor([[30.0], [20.0], [10.0]]),
        far_distance=torch.tensor([9.0, 4.0, 0.0]),
    )
    assert moved.tolist() == [[2.0], [30.0], [20.0], [7.0]]


def test_means_keep_the_dtype_of_the_centroids():
    sums = torch.tensor([[3.0]], dtype=torch.float64)
    moved = move_to_means(torch.tensor([2]), sums, torch.zeros(1, 1), torch.zeros(0, 1), torch.zeros(0))
    assert moved.dtype == torch.float32
    assert moved.tolist() == [[1.5]]
