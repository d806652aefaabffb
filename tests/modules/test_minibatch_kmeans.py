import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans

from data.schemas import InputError
from modules.feature_rows import RowBlocks
from modules.kmeans import kmeans
from modules.lloyd import lloyd, nearest
from modules.minibatch_kmeans import KmeansEffort, _minibatch_epoch, _pass, _streamed_lloyd, minibatch_kmeans

REPOSITORY = Path(__file__).resolve().parents[2]
STREAMED = KmeansEffort(memory_rows=600, batch_rows=256)
"""A matrix of more than 600 rows is streamed."""

WITH_FULL_SAMPLE = KmeansEffort(memory_rows=24 * 256, batch_rows=1024)
"""A sample of as many rows per code as there always are where memory allows; more rows are streamed."""


def blobs(num_rows=12_000, width=8, num_blobs=40):
    generator = np.random.default_rng(0)
    centres = 3 * generator.standard_normal((num_blobs, width))
    rows = centres[generator.integers(num_blobs, size=num_rows)] + generator.standard_normal((num_rows, width))
    return rows.astype(np.float32)


def uniform(num_rows=12_000, width=8):
    return np.random.default_rng(1).random((num_rows, width), dtype=np.float32)


def duplicated(num_rows=12_000):
    """Rows of which each is there about sixty times."""
    return uniform(200)[np.random.default_rng(2).integers(200, size=num_rows)]


def inertia(features, centroids):
    return nearest(torch.from_numpy(features), torch.as_tensor(centroids)).inertia()


@pytest.mark.parametrize("make", [blobs, uniform, duplicated])
@pytest.mark.parametrize("effort", [KmeansEffort(), WITH_FULL_SAMPLE], ids=["in memory", "streamed"])
def test_inertia_is_within_one_percent_of_scikit_learn(make, effort):
    """Means over three seeds, each with one greedy k-means++ start; scikit-learn iterates to its own convergence."""
    features = make()
    ours = [inertia(features, minibatch_kmeans(features, 24, effort=effort, seed=seed)) for seed in range(3)]
    theirs = [KMeans(24, n_init=1, random_state=seed).fit(features).inertia_ for seed in range(3)]
    batches = [MiniBatchKMeans(24, n_init=1, random_state=seed).fit(features).inertia_ for seed in range(3)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)
    assert np.mean(ours) < np.mean(batches)


@pytest.mark.parametrize("effort", [KmeansEffort(), WITH_FULL_SAMPLE], ids=["in memory", "streamed"])
def test_the_order_of_the_rows_does_little(effort):
    features = blobs()
    in_order = features[features[:, 0].argsort()]
    shuffled, ordered = (inertia(rows, minibatch_kmeans(rows, 24, effort=effort)) for rows in (features, in_order))
    assert ordered == pytest.approx(shuffled, rel=0.02)


def test_a_matrix_that_memory_holds_gets_what_kmeans_finds():
    features, effort = blobs(600), STREAMED
    expected = kmeans(
        torch.from_numpy(features), 5, num_iterations=200, num_rounds=effort.num_rounds, tolerance=effort.tolerance
    )
    assert minibatch_kmeans(features, 5, effort=effort).equal(expected)


def test_streaming_follows_the_seed_and_leaves_the_global_generator_alone():
    features, state = uniform(1500), torch.get_rng_state()
    first, again, other = (minibatch_kmeans(features, 9, effort=STREAMED, seed=seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("num_rows", [10, 1500])
def test_the_transform_comes_first(num_rows):
    features = np.repeat(np.array([[1.0, 7.0], [3.0, 9.0]], dtype=np.float32), num_rows // 2, axis=0)
    centroids = minibatch_kmeans(features, 2, transform=lambda rows: 10 * rows[:, :1], effort=STREAMED)
    assert centroids.sort(dim=0).values.tolist() == [[10.0], [30.0]]


@pytest.mark.parametrize("num_rows", [1, 3, 100, 2000])
@pytest.mark.parametrize("num_values", [1, 2])
def test_fewer_distinct_rows_than_codes(num_rows, num_values):
    features = (np.arange(num_rows) % num_values)[:, None] * np.ones(4, dtype=np.float32) + np.float32(5)
    centroids = minibatch_kmeans(features, 16, effort=STREAMED)
    assert len(centroids.unique(dim=0)) == 16
    assert centroids.isfinite().all()
    assert nearest(torch.from_numpy(features), centroids).distance.max() < 1e-4


def test_a_pass_is_a_step_of_lloyd_over_all_rows():
    features = torch.tensor([[0.0], [2.0], [9.0], [11.0], [50.0]])
    total, centroids = _pass(RowBlocks(features, block_rows=2), torch.tensor([[1.0], [12.0], [-99.0]]))
    assert total == 1 + 1 + 9 + 1 + 38**2
    # The last centroid had no row, and goes to the one farthest from its own.
    torch.testing.assert_close(centroids, torch.tensor([[1.0], [70 / 3], [50.0]]))


def test_a_far_row_of_an_early_block_is_remembered():
    features = torch.tensor([[50.0], [0.0], [1.0], [0.0], [1.0]])
    _, centroids = _pass(RowBlocks(features, block_rows=1), torch.tensor([[0.0], [-9.0], [-99.0]]))
    assert sorted(centroids.flatten().tolist()) == pytest.approx([1.0, 10.4, 50.0])


def test_a_mini_batch_moves_a_centroid_by_one_over_its_rows():
    batches = [torch.tensor([[3.0], [20.0]]), torch.tensor([[4.0], [5.0]])]
    centroids, counts = _minibatch_epoch(batches, torch.tensor([[0.0], [20.0], [90.0]]), torch.tensor([2, 0, 0]))
    assert counts.tolist() == [5, 1, 0]
    # (2 x 0 + 3) / 3, then (3 x 1 + 4 + 5) / 5
    torch.testing.assert_close(centroids, torch.tensor([[2.4], [20.0], [90.0]]))


@pytest.mark.parametrize("num_rows", [10, 2000])
def test_a_broken_row_is_named(num_rows):
    features = uniform(num_rows)
    features[7, 3] = math.nan
    with pytest.raises(InputError, match=r"NaN or infinity in row 7 \(item 'h'\)"):
        minibatch_kmeans(features, 4, effort=STREAMED, item_keys="abcdefghij")


@pytest.mark.parametrize("name", ["memory_rows", "batch_rows", "num_iterations", "num_rounds", "epochs", "tolerance"])
def test_effort_says_what_it_refuses(name):
    with pytest.raises(InputError, match=f"KmeansEffort.{name} expected at least ., got -1"):
        KmeansEffort(**{name: -1})


PEAK = """
import resource, sys
import numpy as np
from modules.minibatch_kmeans import KmeansEffort, minibatch_kmeans
features = np.load(sys.argv[1], mmap_mode="r")[: int(sys.argv[2])]
effort = KmeansEffort(memory_rows=2000, batch_rows=1024, num_rounds=1, max_passes=1)
minibatch_kmeans(features, 16, effort=effort)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(next(line for line in open("/proc/self/status") if line.startswith("RssFile")).split()[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_matrix(tmp_path):
    """The pages of the file itself are the system's to drop, so they are taken off."""
    width, lengths = 256, (20_000, 200_000)
    features = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float16, shape=(lengths[1], width))
    for begin in range(0, lengths[1], 20_000):
        features[begin : begin + 20_000] = uniform(20_000, width)
    features.flush()
    private = []
    for length in lengths:
        command = [sys.executable, "-c", PEAK, str(tmp_path / "x.npy"), str(length)]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        peak, of_files = map(int, result.stdout.split())
        private.append(peak - of_files)
    # As fp32 the longer matrix has 184 MB more.
    assert private[1] - private[0] < 40_000  # kilobytes


def test_passes_go_on_while_they_gain_and_no_longer():
    features = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    start, rows = features[:20], RowBlocks(features, block_rows=512)
    expected = lloyd(features, start, num_iterations=6).centroids
    effort = KmeansEffort(max_passes=6, pass_tolerance=0)
    torch.testing.assert_close(_streamed_lloyd(rows, start, effort), expected)
    second = lloyd(features, start, num_iterations=2).centroids
    torch.testing.assert_close(_streamed_lloyd(rows, start, KmeansEffort(pass_tolerance=1)), second)
