import sys

import pytest

from data.schemas import InputError
from tests.training.tiny import LinearTask, loop_config
from training.loop import run_training
from training.run_folder import RunFolder, RunOptions


def train(root):
    run = RunFolder.open(root, RunOptions(), seed=3)
    return run_training(LinearTask(), loop_config(num_steps=4), run, seed=3, wandb_logging=True)


@pytest.mark.slow
def test_wandb_offline_writes_its_run_beside_metrics_jsonl(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "run")
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_asked_for_and_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"train.wandb_logging = True needs the package wandb. Install it"):
        train(tmp_path / "run")


def test_training_does_not_import_wandb_unless_asked(tmp_path):
    import subprocess

    code = (
        "import sys, training.cli, training.loop; "
        "print([n for n in ('wandb', 'polars', 'transformers', 'sentence_transformers', 'matplotlib') "
        "if n in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
