"""Claim: batches whose rows all come from the disk at least 5 times as fast as by fancy indexing.

2 million x 384 fp16 features in a file of 1.5 GB, batches of 1,024 random rows as float32. Three states of the file:

    from disk    its pages are dropped from the system's memory before every batch, as for a file beyond that memory
    cold         they are dropped once, and come back as rows are read: the first steps of a run
    warm         they are in memory

The training step is forward and backward of a small autoencoder on the batch. Verified first: all contenders give the
same batches. Where the system cannot drop pages, cases say "warm" and nothing is claimed.

    ours                `FeatureBatches`, read by a thread two batches ahead; from disk: `gather_rows`, without a thread
    without_prefetch    `FeatureBatches` that reads a batch when it is asked for
    row_by_row          `gather_rows` as from memory: in the file's order, the system not asked beforehand
    fancy_indexing      features[rows] in the loop, the baseline

    python -m benchmarks.feature_batches
    python -m benchmarks.feature_batches --quick     # 100,000 rows, no claim
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import begin, finish, parser, summarize, synchronize
from benchmarks.rungs import OURS
from data.batching import FeatureBatches, ShuffledEpochs
from data.mapped_rows import gather_rows
from data.schemas import InputError
from training.cli import run_cli

WIDTH = 384
BATCH_SIZE = 1024
BASELINE = "fancy_indexing"
CLAIM_TIMES_BASELINE = 5
_BLOCK_ROWS = 100_000


def write_features(path: Path, num_rows: int, width: int) -> None:
    """A `.npy` file of [num_rows, width] normal fp16 numbers, made in blocks.

    Raises:
        InputError: if the disk has no room for it.
    """
    needed, free = 2 * num_rows * width, shutil.disk_usage(path.parent).free
    if 1.1 * needed > free:
        raise InputError(
            f"the features need {needed / 1e9:.1f} GB of temporary disk, {free / 1e9:.1f} GB are free. "
            "Set TMPDIR to a larger disk, or give --quick."
        )
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_rows, width))
    generator = np.random.default_rng(0)
    for start in range(0, num_rows, _BLOCK_ROWS):
        block = features[start : start + _BLOCK_ROWS]
        block[:] = generator.standard_normal(block.shape, dtype=np.float32)
    features.flush()


def drop_from_cache(path: Path) -> bool:
    """Have the system forget a file's pages, which no process may map; False where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return True


def by_fancy_indexing(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[B, D] float32, as one writes it in a loop."""
    return np.asarray(features[rows], dtype=np.float32)


def readers() -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """What reads rows of a memory map, by name."""
    return {
        OURS: partial(gather_rows, from_disk=True),
        "row_by_row": partial(gather_rows, from_disk=False),
        BASELINE: by_fancy_indexing,
    }


def contenders() -> dict[str, Callable[[Path], Callable[[int], Tensor]]]:
    """What opens the file and returns the function from a step to its batch, by name."""

    def ours(path: Path, *, prefetch: int) -> Callable[[int], Tensor]:
        return FeatureBatches(np.load(path, mmap_mode="r"), BATCH_SIZE, seed=0, prefetch=prefetch).batch

    def fancy_indexing(path: Path) -> Callable[[int], Tensor]:
        features = np.load(path, mmap_mode="r")
        order = ShuffledEpochs(len(features), BATCH_SIZE, seed=0)

        def batch(step: int) -> Tensor:
            rows = np.concatenate([chosen for _, chosen in order.examples(step)])
            return torch.from_numpy(by_fancy_indexing(features, rows))

        return batch

    return {OURS: partial(ours, prefetch=2), "without_prefetch": partial(ours, prefetch=0), BASELINE: fancy_indexing}


def verify(path: Path) -> None:
    """Stop unless every contender gives the same batches.

    Raises:
        AssertionError: if one does not, so that no time is reported.
    """
    opened = {name: open_file(path) for name, open_file in contenders().items()}
    for step in (0, 1, 2, 7):
        expected = opened[BASELINE](step)
        for name, batch in opened.items():
            assert torch.equal(batch(step), expected), f"{name} gives another batch at step {step}"
    features = np.load(path, mmap_mode="r")
    rows = np.random.default_rng(0).integers(len(features), size=BATCH_SIZE)
    for name, read in readers().items():
        assert np.array_equal(read(features, rows), by_fancy_indexing(features, rows)), f"{name} gives other rows"


def training_step(width: int, device: str) -> Callable[[Tensor], object]:
    """Forward and backward of a small autoencoder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, width)).to(device)

    def step(batch: Tensor) -> None:
        x = batch.to(device)
        model.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()

    return step


def run(batch: Callable[[int], Tensor], step: Callable[[Tensor], object], num_steps: int, device: str) -> list[float]:
    """Seconds of each step, from asking for its batch to the step's end, after one in which the order is drawn."""
    seconds = []
    for number in range(num_steps + 1):
        start = perf_counter()
        step(batch(number))
        synchronize(device)
        seconds.append(perf_counter() - start)
    return seconds[1:]


def case_rows(
    path: Path, doing: str, step: Callable[[Tensor], object], *, cold: bool, num_steps: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Result rows of one case: contenders take turns, each with a file of its own state of cache."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders()}
    for _ in range(rounds):
        for name, open_file in contenders().items():
            prepared = drop_from_cache(path) if cold else read_whole(path)
            seconds[name] += run(open_file(path), step, num_steps, device)
    return _summarized(f"{'cold' if prepared and cold else 'warm'}, {doing}", seconds)


def disk_rows(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Result rows of single batches, every one after the file's pages were dropped."""
    generator = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in readers()}
    for _ in range(rounds):
        for name, read in readers().items():
            dropped = drop_from_cache(path)
            features = np.load(path, mmap_mode="r")
            rows = generator.choice(len(features), BATCH_SIZE, replace=False)
            start = perf_counter()
            read(features, rows)
            seconds[name].append(perf_counter() - start)
            del features  # pages that are mapped would stay
    return _summarized("from disk" if dropped else "warm, single batches", seconds)


def _summarized(case: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = [{"case": case, "implementation": name, **summary(times)} for name, times in seconds.items()]
    baseline = next(row["rows_per_second"] for row in rows if row["implementation"] == BASELINE)
    return [row | {"times_baseline": round(row["rows_per_second"] / baseline, 2)} for row in rows]


def verdict(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim, where it was measured."""
    measured = [row for row in rows if row["case"] == "from disk" and row["implementation"] == OURS]
    case = f"claim: from disk at least {CLAIM_TIMES_BASELINE} times {BASELINE}"
    return [
        {"case": case, "times_baseline": row["times_baseline"], "holds": row["times_baseline"] >= CLAIM_TIMES_BASELINE}
        for row in measured
    ]


def read_whole(path: Path) -> bool:
    """Have the system hold a file's pages as far as its memory allows."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    return True


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Rows per second over all steps, and the times of single ones."""
    return {"rows_per_second": round(BATCH_SIZE * len(seconds) / sum(seconds)), **summarize(seconds)}


def main(argv: Sequence[str]) -> int:
    """Write the features, verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device, quick = begin(arguments), arguments.quick
    settings: dict[str, Any] = {"num_steps": 20 if quick else 100, "rounds": 2 if quick else 3, "device": device}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        write_features(path, 100_000 if quick else 2_000_000, WIDTH)
        verify(path)
        step = training_step(WIDTH, device)
        rows = disk_rows(path, 3 if quick else 20)
        for doing, work in (("reading alone", lambda batch: None), ("with a training step", step)):
            for cold in (True, False):
                rows += case_rows(path, doing, work, cold=cold, **settings)
        same = torch.randn(BATCH_SIZE, WIDTH)
        alone = summary(run(lambda number: same, step, settings["num_steps"], device))
    rows.append({"case": "nothing read, a training step alone", "implementation": "same batch", **alone})
    claims = [] if quick else verdict(rows)
    finish("feature_batches", [*rows, *claims], arguments, device)
    return 0 if all(claim["holds"] for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
