"""Claim: a ratings file of MovieLens-32M's size is prepared in under 60 seconds and 6 GB on two cores.

    python -m benchmarks.prepare            # 32 million generated ratings, needs 2 GB of temporary disk
    python -m benchmarks.prepare --quick    # one million

The file has ML-32M's schema, order and rough shape (200,948 users with at least 20 ratings each, long-tailed movies);
what is prepared is checked against the file before the time counts. The preparing process is a fresh one, so that
its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.common import REPOSITORY, print_table, write_result
from data.processed import DatasetConfig, PreparedDataset, RecDataset, load_dataset

NUM_MOVIES = 84_432
RATINGS_PER_USER = 159
MAX_SECONDS = 60
MAX_GIGABYTES = 6


def main() -> int:
    """Generates, prepares in a subprocess, checks, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one million ratings instead of 32 million")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(_timed_preparation(options.folder)))
        return 0
    num_ratings = 1_000_000 if options.quick else 32_000_204
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "raw", num_ratings)
        row = _prepare_in_subprocess(folder)
        verify(PreparedDataset(folder / "dataset" / "prepared" / "ml-32m"), folder / "raw")
    row = {"case": f"{num_ratings:,} ratings", "implementation": "ours", **row}
    print_table([row])
    print("written to", write_result("prepare", [row], quick=options.quick).relative_to(REPOSITORY))
    return 0 if row["median_ms"] < MAX_SECONDS * 1000 and row["peak_mb"] < MAX_GIGABYTES * 1000 else 1


def generate(folder: Path, num_ratings: int) -> None:
    """`ratings.csv` and `movies.csv`, sorted by user and movie as GroupLens ships them."""
    import polars as pl

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    num_users = num_ratings // RATINGS_PER_USER
    lengths = rng.lognormal(4.3, 1.2, num_users)
    lengths = np.maximum(20, lengths / lengths.sum() * num_ratings * 0.97).astype(np.int64)
    users = np.repeat(np.arange(1, num_users + 1), lengths)
    users = np.concatenate([users, rng.integers(1, num_users + 1, max(0, num_ratings - len(users)))])[:num_ratings]
    # Half of MovieLens' movies have fewer than five ratings.
    movies = (NUM_MOVIES * np.minimum(rng.exponential(1 / 14, num_ratings), 0.9999)).astype(np.int64)
    first_times = rng.integers(800_000_000, 1_690_000_000, num_users + 1)
    times = first_times[users] + rng.exponential(40_000, num_ratings).astype(np.int64)
    ratings = pl.DataFrame({"userId": users, "movieId": movies * 3 + 1, "timestamp": times})
    ratings = ratings.with_columns(rating=pl.Series(rng.integers(1, 11, num_ratings) / 2)).sort("userId", "movieId")
    ratings.select("userId", "movieId", "rating", "timestamp").write_csv(folder / "ratings.csv")
    ids = np.arange(NUM_MOVIES) * 3 + 1
    titles = pl.format("Film, No. {} (1999)", pl.Series("id", ids))
    table = pl.DataFrame({"movieId": ids}).with_columns(title=titles, genres=pl.lit("Comedy|Drama"))
    table.write_csv(folder / "movies.csv")


def verify(dataset: PreparedDataset, raw: Path) -> None:
    """Compares what was prepared with the raw file: filtering reached its fixpoint, and the order is right.

    Raises:
        AssertionError: if the preparation is wrong, so that no time is reported.
    """
    import polars as pl

    items, offsets = dataset.histories.item_ids.numpy(), dataset.histories.offsets.numpy()
    assert np.diff(offsets).min() >= 5
    assert np.bincount(items).min() >= 5
    times = dataset.histories.timestamps.numpy()
    falls = np.flatnonzero(np.diff(times) < 0) + 1
    assert np.isin(falls, offsets).all()
    counts = dataset.manifest["counts"]
    num_raw = pl.scan_csv(raw / "ratings.csv").select(pl.len()).collect().item()
    assert counts["interactions"] + counts["filtered_rows"] + counts["repeated_rows"] == num_raw
    users = pl.read_parquet(dataset.folder / "users.parquet")
    for row in (0, len(users) // 2, len(users) - 1):
        _verify_history(dataset, users["user_key"][row], row, raw)


def _verify_history(dataset: PreparedDataset, user_key: str, row: int, raw: Path) -> None:
    import polars as pl

    lines = pl.scan_csv(raw / "ratings.csv").filter(pl.col("userId") == int(user_key)).collect()
    kept = lines.filter(lines["movieId"].cast(pl.String).is_in(dataset.catalogue.item_keys))
    wanted = kept.unique(["movieId", "timestamp"], maintain_order=True).sort("timestamp", maintain_order=True)
    begin, end = dataset.histories.offsets[row : row + 2].tolist()
    keys = [dataset.catalogue.item_keys[item] for item in dataset.histories.item_ids[begin:end].tolist()]
    assert keys == wanted["movieId"].cast(pl.String).to_list()


def _prepare_in_subprocess(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prepare", "--folder", str(folder)]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _timed_preparation(folder: Path) -> dict[str, Any]:
    start = perf_counter()
    config = DatasetConfig(dataset=RecDataset.ML_32M, root=str(folder / "dataset"), raw_dir=str(folder / "raw"))
    counts = load_dataset(config).manifest["counts"]
    milliseconds = (perf_counter() - start) * 1000
    return {
        "median_ms": round(milliseconds),
        "peak_mb": round(_peak_bytes() / 1e6),
        "raw_mb": round((folder / "raw" / "ratings.csv").stat().st_size / 1e6),
        "kept_users": counts["users"],
        "kept_items": counts["items"],
        "kept_interactions": counts["interactions"],
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process alone; getrusage would include what its parent had before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
