from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.histories import build_batches, read_lengths, typical_batch
from data.schemas import InputError


def test_examples_are_the_prefixes_that_training_may_see() -> None:
    # Without the last two items 3, 1 and 0 items are left, hence 2, 0 and 0 targets that have a history.
    batches = build_batches(np.array([5, 3, 2]), batch_size=2)
    assert batches.num_examples == 2
    assert sorted(batches.batch(0).offsets.diff().tolist()) == [1, 2]


def test_real_lengths(shared_data: Path) -> None:
    lengths, source = read_lengths(shared_data / "amazon_p5" / "beauty")
    assert source == "amazon-beauty"
    assert (len(lengths), lengths.sum()) == (22363, 198502)
    assert build_batches(lengths, 256).num_examples == 131413


def test_lengths_of_a_prepared_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "prepared" / "shop"
    folder.mkdir(parents=True)
    save_file({"offsets": torch.tensor([0, 5, 9, 16], dtype=torch.int32)}, folder / "histories.safetensors")
    lengths, source = read_lengths(tmp_path)
    assert (lengths.tolist(), source) == ([5, 4, 7], "shop")


def test_synthetic_lengths_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REC_SHARED_DATA", str(tmp_path))
    lengths, source = read_lengths(None)
    assert "SYNTHETIC" in source
    assert abs(torch.tensor(lengths).float().mean().item() - 198502 / 22363) < 0.2
    assert lengths.min() == 5


def test_a_folder_without_histories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no histories\. Give --lengths a prepared"):
        read_lengths(tmp_path)


def test_a_typical_batch_has_a_user_token_and_four_tokens_per_item(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REC_SHARED_DATA", str(tmp_path))
    batch, described = typical_batch(None, 8, "cpu")
    assert ((batch.offsets.diff() - 1) % 4).eq(0).all()
    assert f"batch 8, {len(batch.tokens)} tokens" in described
