"""fit_baseline.py from the command line to the artifact, on a tiny data set."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import evaluate
import fit_baseline
import tasks.outcome
from modules.artifact import load_model_artifact
from modules.recommender import Recommender
from tests.tiny_dataset import NUM_COLD_TEST, NUM_ITEMS, NUM_USERS, write_interactions
from training.cli import main

CONFIG = """
include "{configs}/base/baseline.gin"
DatasetConfig.dataset = %RecDataset.TABLES
DatasetConfig.tables = @TablesConfig()
DatasetConfig.root = "{folder}/dataset"
DatasetConfig.min_interactions = 0
TablesConfig.interactions = "{folder}/log.csv"
train.save_dir_root = "{folder}/run"
train.model = @UserKNNConfig()
train.max_history = 3
"""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = {"config.gin", "operative_config.gin", "env.json", "metrics.json", "model", "report", "checkpoints"}


def fit(folder: Path, *arguments: str) -> int:
    return main(fit_baseline.train, "fit_baseline", [str(folder / "config.gin"), *arguments])


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr(tasks.outcome, "_report", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    write_interactions(folder / "log.csv")
    (folder / "config.gin").write_text(CONFIG.format(configs=CONFIGS, folder=folder))
    return folder


@pytest.mark.parametrize("name", ["popularity", "random", "item_knn", "user_knn"])
def test_a_run_ends_in_an_artifact_that_ranks_as_it_was_evaluated(folder, tmp_path, name):
    config = {"popularity": "Popularity", "random": "Random", "item_knn": "ItemKNN", "user_knn": "UserKNN"}[name]
    run = tmp_path / "run"
    changes = [f"--gin.train.save_dir_root={run}", f"--gin.train.model=@{config}Config()", "--gin.train.seed=4"]
    assert fit(folder, *changes) == 0
    assert {path.name for path in run.iterdir()} >= FILES
    assert json.loads((run / "env.json").read_text())["seed"] == 4
    metrics = json.loads((run / "metrics.json").read_text())
    for ranker in {name, "popularity", "item_knn"}:
        assert metrics[f"{ranker}/test/all/count"] == metrics[f"{ranker}/valid/all/count"] == NUM_USERS
        assert metrics[f"{ranker}/test/cold/count"] == NUM_COLD_TEST
    ranks = load_file(run / "ranks_test.safetensors")
    assert set(ranks) == {"rows", "targets", "ranks/popularity", "ranks/item_knn", f"ranks/{name}"}

    artifact = load_model_artifact(run)
    assert (artifact.system, artifact.tokenizer) == (name, None)
    assert artifact.model.config.num_items == NUM_ITEMS
    assert getattr(artifact.model.config, "seed", 4) == 4
    assert int(artifact.catalogue.cold.sum()) == NUM_COLD_TEST
    ranker = artifact.make_ranker(batch_size=7)
    assert (ranker.name, ranker.max_history, ranker.batch_size) == (name, 3, 7)

    again = tmp_path / "again.json"
    assert evaluate.main([str(run), "--no-baselines", "--json", str(again)]) == 0
    evaluated = json.loads(again.read_text())
    assert {key: value for key, value in evaluated.items() if key != "about"} == {
        key: value for key, value in metrics.items() if key.startswith(f"{name}/test/")
    }
    (found,) = Recommender.from_pretrained(run, device="cpu").recommend([["i1", "i2"]], k=3)
    assert len(found) == 3


def test_a_trial_stops_at_the_artifact(folder):
    assert fit(folder, "--dry-run") == 0
    trial = Path(f"{folder}/run-dry-run")
    assert load_model_artifact(trial).system == "user_knn"
    assert not (trial / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "3"], "a counted baseline has none"),
        (["--gin.UserKNNConfig.num_users=7"], "UserKNNConfig: num_users = 7 is filled in"),
        (["--gin.UserKNNConfig.decay=2.0"], "decay = 2.0 is out of range"),
        (["--gin.train.max_history=0"], "fit_baseline.train.max_history expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_clear_line(folder, arguments, message, capsys):
    assert fit(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "run").exists()


def test_a_run_is_not_replaced_by_accident_and_is_done_anew_on_request(folder, capsys):
    assert fit(folder) == 0
    before = (folder / "run" / "metrics.json").read_text()
    assert fit(folder) == 2
    assert "already holds a run" in capsys.readouterr().err
    for option in (["--resume", "auto"], ["--overwrite"]):
        assert fit(folder, *option) == 0
        assert (folder / "run" / "metrics.json").read_text() == before
    assert fit(folder, "--resume", "auto", "--allow-changes", "--gin.UserKNNConfig.decay=0.25") == 0
    assert load_model_artifact(folder / "run").model.config.decay == 0.25
    assert "UserKNNConfig.decay = 0.25" in (folder / "run" / "operative_config.gin").read_text()
