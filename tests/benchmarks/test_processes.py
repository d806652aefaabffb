import json

import pytest
import torch

from benchmarks import processes
from benchmarks.processes import measure, train_share, verify, window_seconds


def trains_at(milliseconds):
    """A stand-in for `train` that writes what a training of so many processes leaves behind."""

    def train(name, folder, *, num_processes, num_steps, threads):
        folder.mkdir(parents=True)
        speed = 1000 * processes.BATCH_SIZE / milliseconds[num_processes]
        records = [{"train/loss": 1.0, "train/examples_per_second": speed} for _ in range(num_steps // 10)]
        lines = [*records, {"valid/error": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        torch.save({"weight": torch.ones(2), "codebooks_initialized": torch.tensor(True)}, folder / "weights.pt")
        return folder

    return train


def test_two_processes_are_compared_with_one(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "train", trains_at({1: 10.0, 2: 15.0}))
    one, two = measure("decoder", tmp_path, num_steps=30, repeats=2, threads=2)
    assert (one["implementation"], one["threads_each"], one["median_ms"]) == ("one_process", 2, 10.0)
    assert (two["implementation"], two["threads_each"], two["median_ms"]) == ("two_processes", 1, 15.0)
    assert one["examples_per_second"] == 25_600
    assert two["times_one_process"] == 1.5
    assert two["difference"] == 0.0


def test_other_weights_are_noticed(tmp_path):
    for name, value in (("one", 1.0), ("two", 1.01)):
        (tmp_path / name).mkdir()
        torch.save({"weight": torch.full((2,), value)}, tmp_path / name / "weights.pt")
    with pytest.raises(AssertionError):
        verify("decoder", [tmp_path / "one", tmp_path / "two"])


def test_a_share_of_a_training_leaves_weights_and_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "BATCH_SIZE", 8)
    monkeypatch.setattr(processes, "WINDOW", 1)
    train_share("rqvae", tmp_path / "run", 3)
    assert len(window_seconds(tmp_path / "run")) == 2
    assert torch.load(tmp_path / "run" / "weights.pt")["codebooks_initialized"]
