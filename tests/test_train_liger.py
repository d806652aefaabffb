"""train_decoder.py on models that read item features: LIGER, its ablations, and what users get wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import tasks.outcome
import train_decoder
from data.features import FeatureConfig
from data.schemas import InputError
from modules.artifact import load_model_artifact
from modules.dense.projected_items import ProjectedItems
from modules.item_tower import ItemInputConfig
from modules.model import RetrievalModelConfig
from tasks.protocol import EvaluationProtocol
from tests.tiny_dataset import MODEL_SIZES, NUM_COLD_TEST, NUM_ITEMS, random_tokenizer, walks, write_interactions
from training.loop_config import LoopConfig
from training.run_folder import RunOptions

ITEMS = ItemInputConfig(hidden_dims=(8,), num_positions=5)
LIGER = RetrievalModelConfig(
    languages={"text": (1,)}, num_user_buckets=0, items=ITEMS, embedding_loss_weight=1.0, **MODEL_SIZES
)
LOOP = LoopConfig(num_steps=6, learning_rate=3e-3, eval_every=3, checkpoint_every=3, log_every=1)
MODES = ("hybrid@4", "generative", "dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("liger")
    write_interactions(folder / "log.csv")
    random_tokenizer(walks(folder / "dataset", folder / "log.csv")).save_pretrained(folder / "tokenizer")
    np.save(folder / "features.npy", np.random.default_rng(0).standard_normal((NUM_ITEMS, 6)).astype(np.float32))
    keys = [f"i{number}" for number in range(NUM_ITEMS)]
    (folder / "features.keys.txt").write_text("\n".join(keys) + "\n")
    return folder


def train(folder: Path, name: str, model: RetrievalModelConfig = LIGER, **changes) -> Path:
    settings = {
        "options": RunOptions(),
        "features": FeatureConfig(encoder="file", path=str(folder / "features.npy")),
        "loop": LOOP,
        "modes": MODES,
        "beam_width": 8,
        **changes,
    }
    return train_decoder.train(
        save_dir_root=str(folder / name),
        dataset=walks(folder / "dataset", folder / "log.csv"),
        model=model,
        tokenizer=str(folder / "tokenizer"),
        batch_size=8,
        max_history=5,
        **settings,
    )


@pytest.fixture(scope="module")
def liger(folder) -> Path:
    return train(folder, "run")


def test_every_mode_is_evaluated_and_the_first_one_selects(liger):
    metrics = json.loads((liger.parent / "metrics.json").read_text())
    for mode in MODES:
        assert metrics[f"{mode}/test/cold/count"] == NUM_COLD_TEST
        assert 0 <= metrics[f"{mode}/test/all/ndcg@10"] <= 1
    logged = [json.loads(line) for line in (liger.parent / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in logged for name in record}
    assert {"hybrid@4/valid/all/ndcg@10", "train/loss_sid", "train/loss_embedding"} <= names
    assert not any(name.startswith(("generative/", "dense/")) or "/test/" in name for name in names)


def test_the_artifact_gives_the_numbers_of_training(folder, liger):
    """So that no ranker went on with item vectors of weights that training has changed since."""
    from data.processed import load_dataset

    artifact = load_model_artifact(liger)
    dataset = load_dataset(walks(folder / "dataset", folder / "log.csv"))
    protocol = EvaluationProtocol.of(dataset, "leave_one_out", max_history=5)
    expected = json.loads((liger.parent / "metrics.json").read_text())
    rankers = [artifact.make_ranker(), artifact.make_ranker(mode="generative"), artifact.make_ranker(mode="dense")]
    assert [ranker.name for ranker in rankers] == list(MODES)
    found = protocol.evaluate(rankers, "test")
    assert found == {key: expected[key] for key in found}


def test_cold_items_are_those_that_training_does_not_show(liger):
    items = load_model_artifact(liger).items
    assert items is not None
    assert int(items.cold.sum()) == NUM_COLD_TEST
    assert items.features.shape == (NUM_ITEMS, 6)
    assert not items.missing.any()


@pytest.fixture
def without_test_metrics(monkeypatch):
    """For tests that ask nothing of what follows the training."""
    monkeypatch.setattr(train_decoder, "finish", lambda *_, **__: None)


@pytest.mark.usefixtures("without_test_metrics")
def test_an_interrupted_run_ends_as_the_uninterrupted_one(folder, liger):
    half = replace(LOOP, num_steps=3)
    train(folder, "stopped", loop=half)
    resumed = train(folder, "stopped", options=RunOptions(resume="auto", allow_changes=True))
    one, other = load_model_artifact(liger).model.state_dict(), load_model_artifact(resumed).model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_dense_head_alone_has_no_decoder_and_projects_the_catalogue_once_per_state(folder, monkeypatch):
    monkeypatch.setattr(tasks.outcome, "_report", lambda *_: None)
    dense = replace(LIGER, sid_loss_weight=0.0)
    with mock.patch.object(ProjectedItems, "_project_", autospec=True, side_effect=ProjectedItems._project_) as calls:
        run = train(folder, "dense", dense, modes=("dense",))
    assert calls.call_count == 3  # at either evaluation, and for valid and test of the best weights
    model = load_model_artifact(run).model
    assert not any(name.startswith(("decoder.", "heads.")) for name in model.state_dict())


@pytest.mark.usefixtures("without_test_metrics")
def test_text_input_alone_has_no_dense_head(folder):
    artifact = load_model_artifact(
        train(folder, "text", replace(LIGER, embedding_loss_weight=0.0), modes=("generative",))
    )
    with pytest.raises(InputError, match="dense"):
        artifact.make_ranker(mode="dense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "train_decoder.train.features = @FeatureConfig()"),
        ({"modes": ()}, "at least one way to retrieve"),
        ({"modes": ("hybrid@9",)}, "beam"),
        ({"modes": ("hybird",)}, "valid modes: generative, dense, hybrid"),
        ({"model": replace(LIGER, items=None, embedding_loss_weight=0.0), "modes": ("dense",)}, "dense head"),
        ({"model": replace(LIGER, items=replace(ITEMS, num_features=7))}, "the item features are 6 wide"),
        ({"model": replace(LIGER, items=replace(ITEMS, num_positions=4))}, "num_positions"),
    ],
)
def test_mistakes_end_in_one_clear_error(folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        train(folder, str(tmp_path / "wrong"), **changes)


def test_a_model_that_is_trained_on_nothing_is_refused():
    with pytest.raises(InputError, match="not both 0"):
        replace(LIGER, sid_loss_weight=0.0, embedding_loss_weight=0.0)
