from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.train_step import build_batches, read_lengths
from data.schemas import InputError


def test_examples_are_the_prefixes_that_training_may_see() -> None:
    # Without the last two items 3, 1 and 0 items are left, hence 2, 0 and 0 targets that have a history.
    batches = build_batches(np.array([5, 3, 2]), batch_size=2)
    assert batches.num_examples == 2
    assert sorted(batches.batch(0).offsets.diff().tolist()) == [1, 2]


def test_real_lengths(shared_data: Path) -> None:
    lengths, source = read_lengths(shared_data / "amazon_p5" / "beauty")
    assert source == "Amazon Beauty"
    assert (len(lengths), lengths.sum()) == (22363, 198502)
    assert build_batches(lengths, 256).num_examples == 131413


def test_synthetic_lengths_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REC_SHARED_DATA", str(tmp_path))
    lengths, source = read_lengths(None)
    assert "SYNTHETIC" in source
    assert abs(torch.tensor(lengths).float().mean().item() - 198502 / 22363) < 0.2
    assert lengths.min() == 5


def test_a_raw_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Give --raw-dir the folder"):
        read_lengths(tmp_path)
