"""train_sequence.py from the command line to the artifact, on tiny settings."""

import json
from pathlib import Path

import pytest
import torch

import tasks.outcome
import train_sequence
from data.schemas import InputError
from modules.artifact import load_model_artifact
from modules.sequential.sasrec import SASRecConfig
from tasks.sequence import SequenceTask
from tests.tiny_dataset import NUM_COLD_TEST, NUM_ITEMS, NUM_USERS, write_interactions
from training.cli import main
from training.run_folder import RunOptions

CONFIG = """
include "{configs}/base/sequence.gin"
DatasetConfig.dataset = %RecDataset.TABLES
DatasetConfig.tables = @TablesConfig()
DatasetConfig.root = "{folder}/dataset"
DatasetConfig.min_interactions = 0
TablesConfig.interactions = "{folder}/log.csv"
train.save_dir_root = "{folder}/run"
train.model = @SASRecConfig()
train.batch_size = 8
SASRecConfig.d_model = 8
SASRecConfig.max_history = 3
LoopConfig.num_steps = 6
LoopConfig.eval_every = 3
LoopConfig.checkpoint_every = 2
LoopConfig.log_every = 1
"""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def train(folder: Path, *arguments: str) -> int:
    return main(train_sequence.train, "train_sequence", [str(folder / "config.gin"), *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    write_interactions(folder / "log.csv")
    (folder / "config.gin").write_text(CONFIG.format(configs=CONFIGS, folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.outcome, "_report", lambda *_: None)
        assert train(folder) == 0
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model_artifact(run).model.state_dict()


def test_the_run_ends_in_metrics_of_the_model_beside_baselines(folder):
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    for ranker in ("sasrec", "popularity", "item_knn"):
        assert metrics[f"{ranker}/test/all/count"] == NUM_USERS
        assert metrics[f"{ranker}/test/cold/count"] == NUM_COLD_TEST
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("sasrec/valid/all/ndcg@10" in record for record in logged)
    assert not any("/test/" in key for record in logged for key in record)


def test_the_artifact_ranks_without_semantic_ids(folder):
    artifact = load_model_artifact(folder / "run")
    assert artifact.system == "sasrec"
    assert artifact.tokenizer is None
    assert artifact.model.config == SASRecConfig(num_items=NUM_ITEMS, d_model=8, max_history=3)
    assert int(artifact.catalogue.cold.sum()) == NUM_COLD_TEST
    assert artifact.make_ranker().name == "sasrec"
    assert artifact.make_ranker().max_history == 3


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(folder, monkeypatch):
    batch = SequenceTask.batch

    def killed(task, step):
        if step == 5:
            raise RuntimeError("killed")
        return batch(task, step)

    place = f"--gin.train.save_dir_root={folder / 'killed'}"
    with monkeypatch.context() as patch:
        patch.setattr(SequenceTask, "batch", killed)
        assert train(folder, place) == 1
    assert not (folder / "killed" / "model").exists()
    monkeypatch.setattr(train_sequence, "finish", lambda *_, **__: None)
    assert train(folder, place, "--resume", "auto") == 0
    torch.testing.assert_close(weights(folder / "killed"), weights(folder / "run"), rtol=0, atol=0)


@pytest.mark.parametrize("trial", [["--dry-run"], ["--profile", "2"]])
def test_a_trial_ends_before_the_test_targets(folder, trial):
    before = (folder / "run" / "metrics.json").read_text()
    assert train(folder, *trial) == 0
    (root,) = folder.glob(f"run-{trial[0].removeprefix('--')}")
    assert (root / "model").is_dir()
    assert not (root / "metrics.json").exists()
    assert (folder / "run" / "metrics.json").read_text() == before


def test_a_number_of_items_that_is_not_the_datas_is_refused(folder, capsys):
    assert train(folder, "--overwrite", "--gin.SASRecConfig.num_items=31") == 2
    assert "SASRecConfig.num_items = 31 contradicts the 30 items of" in capsys.readouterr().err


def test_long_histories_are_cut_and_their_items_are_named(folder, monkeypatch):
    trained: list[SequenceTask] = []

    def remember(task, *_, **__):
        trained.append(task)
        raise InputError("seen")

    monkeypatch.setattr(train_sequence, "run_training", remember)
    assert train(folder, f"--gin.train.save_dir_root={folder / 'long'}") == 2
    batch = trained[0]._batches.batch(0)
    assert batch.offsets.diff().tolist() == [3] * 8
    assert len(trained[0].item_keys(0)) == len({*batch.item_ids.tolist(), *batch.targets.tolist()})


@pytest.mark.parametrize("name", ["batch_size", "max_valid_users"])
def test_settings_that_no_run_could_use(name):
    given = dict.fromkeys(("dataset", "model", "loop"))
    with pytest.raises(InputError, match=rf"train_sequence.train.{name} expected at least 1, got 0"):
        train_sequence.train(options=RunOptions(), save_dir_root="nowhere", **given, **{name: 0})
