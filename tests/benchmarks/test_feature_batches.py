import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import feature_batches as benchmark
from benchmarks.feature_batches import case_rows, contenders, disk_rows, verdict, verify, write_features
from data.schemas import InputError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 8)
    monkeypatch.setattr(benchmark, "_BLOCK_ROWS", 40)
    write_features(tmp_path / "features.npy", 100, 6)
    return tmp_path / "features.npy"


def test_features_are_written_in_blocks_of_which_none_is_left_out(path):
    features = np.load(path)
    assert (features.shape, features.dtype) == ((100, 6), np.float16)
    assert len(np.unique(features, axis=0)) == 100
    assert 0.9 < features.std() < 1.1


def test_a_small_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(InputError, match=r"need 1\.5 GB of temporary disk, 0\.0 GB are free"):
        write_features(tmp_path / "features.npy", 2_000_000, 384)
    assert not (tmp_path / "features.npy").exists()


def test_a_contender_with_other_batches_is_noticed(path, monkeypatch):
    verify(path)
    opened = contenders()
    wrong = opened | {"ours": lambda path: lambda step: torch.zeros(8, 6)}
    monkeypatch.setattr(benchmark, "contenders", lambda: wrong)
    with pytest.raises(AssertionError, match="ours gives another batch at step 0"):
        verify(path)


def test_rows_by_case(path):
    batches = []
    rows = case_rows(path, "reading alone", batches.append, cold=False, num_steps=5, rounds=2, device="cpu")
    assert [row["implementation"] for row in rows] == ["ours", "without_prefetch", "fancy_indexing"]
    assert {row["case"] for row in rows} == {"warm, reading alone"}
    assert all(row["rows_per_second"] > 0 for row in rows)
    assert rows[-1]["times_baseline"] == 1
    assert len(batches) == 3 * 2 * (5 + 1)


def test_rows_per_second_by_hand(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 100)
    assert benchmark.summary([0.5, 1.5, 0.5])["rows_per_second"] == 120


def test_the_claim_by_hand(path):
    rows = disk_rows(path, 2)
    assert [row["implementation"] for row in rows] == ["ours", "row_by_row", "fancy_indexing"]
    judged = [row | {"case": "from disk", "times_baseline": 5.0} for row in rows]
    assert [claim["holds"] for claim in verdict(judged)] == [True]
    assert [claim["holds"] for claim in verdict([row | {"times_baseline": 4.9} for row in judged])] == [False]
    assert verdict([row | {"case": "warm, single batches"} for row in rows]) == []


def test_results_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "WIDTH", 6)
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    (written,) = tmp_path.rglob("feature_batches-quick.json")
    rows = json.loads(written.read_text())["rows"]
    assert len(rows) == 3 + 4 * 3 + 1
    assert rows[-1]["case"] == "nothing read, a training step alone"
