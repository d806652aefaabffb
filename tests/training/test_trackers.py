"""Trackers as training uses them; what they show is looked at in test_metrics_log.py."""

import json
import subprocess
import sys

import pytest
import torch

from tests.training.tiny import LinearTask, loop_config, weights
from training.loop import run_training
from training.run_folder import RunFolder, RunOptions


def train(root, **trackers):
    """Weights and logged values, without what the clock says."""
    task, run = LinearTask(), RunFolder.open(root, RunOptions(), seed=3)
    run_training(task, loop_config(num_steps=10), run, seed=3, **trackers)
    records = [json.loads(line) for line in run.metrics_log.read_text().splitlines()]
    for record in records:
        record.pop("seconds")
        record.pop("train/examples_per_second", None)
    return weights(task), records


@pytest.mark.slow
def test_trackers_stand_beside_metrics_jsonl_and_change_nothing_in_the_training(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard comes with requirements-dev.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    plain, logged = train(tmp_path / "plain")
    tracked, also_logged = train(tmp_path / "tracked", wandb_logging=True, tensorboard_logging=True)
    torch.testing.assert_close(tracked, plain, rtol=0, atol=0)
    assert also_logged == logged
    trackers = tmp_path / "tracked/trackers"
    assert len(list(trackers.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert len(list(trackers.glob("tensorboard/events.out.tfevents.*"))) == 1
    assert json.loads((trackers / "tensorboard.json").read_text())["train"] == 10


def test_training_does_not_import_trackers_unless_asked():
    code = (
        "import sys, training.cli, training.loop; "
        "print([n for n in ('wandb', 'tensorboard', 'polars', 'transformers', 'sentence_transformers', 'matplotlib') "
        "if n in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
