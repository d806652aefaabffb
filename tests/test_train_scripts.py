"""Both training scripts and the demo, from the command line to the artifact, on tiny settings."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
import train_decoder
import train_rqvae
from data.schemas import InputError
from modules.artifact import load_model_artifact
from modules.estimators import QuantizeMode
from modules.recommender import Recommender
from modules.rqvae import RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tasks.rqvae import RqVaeTask
from tests.training.tasks import retrieval_task, tokenizer_settings
from training.cli import RunOptions, main
from training.loop_config import LoopConfig

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs" / "demo"
TINY = (
    "rqvae/LoopConfig.num_steps=40",
    "rqvae/LoopConfig.eval_every=20",
    "rqvae/LoopConfig.warmup_steps=2",
    "train_rqvae.train.pretrain_steps=20",
    "RqVaeConfig.hidden_dims=(32,)",
    "RqVaeConfig.codebook_sizes=(32, 16)",
)
TINY_DECODER = (
    "decoder/LoopConfig.num_steps=6",
    "decoder/LoopConfig.eval_every=3",
    "decoder/LoopConfig.checkpoint_every=3",
    "decoder/LoopConfig.warmup_steps=1",
    "train_decoder.train.batch_size=16",
    "train_decoder.train.beam_width=10",
    "train_decoder.train.max_valid_users=50",
    "RetrievalModelConfig.d_model=16",
    "RetrievalModelConfig.num_encoder_layers=1",
    "RetrievalModelConfig.num_decoder_layers=1",
)


def overrides(folder: Path, *more: str) -> list[str]:
    places = (
        f"DatasetConfig.root={folder / 'dataset'}",
        f"train_rqvae.train.save_dir_root={folder / 'rqvae'}",
    )
    return [f"--gin.{value}" for value in (*TINY, *places, *more)]


def train_both(folder: Path, *arguments: str) -> int:
    place = f"train_decoder.train.save_dir_root={folder / 'decoder'}"
    config = [str(CONFIGS / "decoder.gin"), *overrides(folder, *TINY_DECODER, place)]
    return main(train_decoder.train, "train_decoder", [*config, *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train_both(folder) == 0
    return folder


def test_the_decoder_trains_its_tokenizer_first(folder):
    tokenizer = SemanticIdTokenizer.from_pretrained(folder / "rqvae" / "model")
    assert tokenizer.num_items == 1000
    assert tokenizer.catalogue.cold is not None
    assert int(tokenizer.catalogue.cold.sum()) > 0
    artifact = load_model_artifact(folder / "decoder")
    assert artifact.tokenizer.content_hash == tokenizer.content_hash


def test_a_run_folder_holds_what_the_design_promises(folder):
    run = folder / "decoder"
    expected = {"config.gin", "operative_config.gin", "env.json", "metrics.jsonl", "metrics.json", "checkpoints"}
    assert expected | {"model", "report", "ranks_valid.safetensors", "ranks_test.safetensors"} <= {
        path.name for path in run.iterdir()
    }
    metrics = json.loads((run / "metrics.json").read_text())
    for ranker in ("generative", "popularity", "item_knn"):
        assert metrics[f"{ranker}/test/all/count"] == 3000
        assert 0 <= metrics[f"{ranker}/test/all/recall@10"] <= 1
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not any("/test/" in key for record in logged for key in record)
    assert list((run / "report").glob("*.png"))


def test_the_tokenizer_is_trained_once(folder, tmp_path, monkeypatch, capsys):
    def reached(*_, **__):
        raise InputError("the tokenizer was taken")

    monkeypatch.setattr(train_rqvae, "run_training", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(train_decoder, "run_training", reached)
    place = f"train_decoder.train.save_dir_root={tmp_path / 'second'}"
    config = [str(CONFIGS / "decoder.gin"), *overrides(folder, *TINY_DECODER, place)]
    assert main(train_decoder.train, "train_decoder", config) == 2
    assert "the tokenizer was taken" in capsys.readouterr().err


def test_a_tokenizer_of_other_settings_is_refused(folder, tmp_path, capsys):
    place = f"train_decoder.train.save_dir_root={tmp_path / 'other'}"
    config = [str(CONFIGS / "decoder.gin"), *overrides(folder, *TINY_DECODER, place, "train_rqvae.train.seed=1")]
    assert main(train_decoder.train, "train_decoder", config) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was trained with other data or settings" in error
    assert "train_decoder.train.tokenizer" in error


def test_a_tokenizer_of_the_items_that_another_split_shows_is_another_one():
    def hash_of(train_on: str, split: str) -> str:
        settings, loop = tokenizer_settings(train_on=train_on), LoopConfig(num_steps=1, learning_rate=1.0)
        return train_rqvae._hash_of([], [split], RqVaeConfig(input_dim=8), loop, settings)

    assert hash_of("seen", "liger") != hash_of("seen", "leave_one_out")
    assert hash_of("all", "liger") == hash_of("all", "leave_one_out")


@pytest.mark.parametrize(
    ("train_on", "split", "expected"),
    [
        ("seen", "liger", "not without those of the split 'liger'"),
        ("seen", "leave_one_out", "the tokenizer was taken"),
        ("all", "liger", "the tokenizer was taken"),
    ],
)
def test_a_tokenizer_of_the_items_that_another_split_shows_is_refused(
    folder, tmp_path, monkeypatch, capsys, train_on, split, expected
):
    def reached(*_, **__):
        raise InputError("the tokenizer was taken")

    monkeypatch.setattr(train_decoder, "run_training", reached)
    tokenizer = shutil.copytree(folder / "rqvae" / "model", tmp_path / "tokenizer")
    manifest = json.loads((tokenizer / "manifest.json").read_text())
    assert manifest["provenance"]["train_on"] == "all"
    manifest["provenance"]["train_on"] = train_on
    (tokenizer / "manifest.json").write_text(json.dumps(manifest))
    places = (
        f"train_decoder.train.save_dir_root={tmp_path / 'other'}",
        f"train_decoder.train.tokenizer={tokenizer}",
        f"DatasetConfig.split={split}",
    )
    config = [str(CONFIGS / "decoder.gin"), *overrides(folder, *TINY_DECODER, *places)]
    assert main(train_decoder.train, "train_decoder", config) == 2
    assert expected in capsys.readouterr().err


def test_a_tokenizer_of_another_catalogue_is_refused(folder, tmp_path, capsys):
    places = (
        f"train_decoder.train.save_dir_root={tmp_path / 'other'}",
        f"train_decoder.train.tokenizer={folder / 'rqvae' / 'model'}",
        f"DatasetConfig.root={tmp_path / 'dataset'}",
        "DatasetConfig.seed=5",
    )
    config = [str(CONFIGS / "decoder.gin"), *overrides(folder, *TINY_DECODER, *places)]
    assert main(train_decoder.train, "train_decoder", config) == 2
    assert "Train a tokenizer on this data set" in capsys.readouterr().err


def test_a_second_run_into_the_folder_is_refused(folder, capsys):
    before = (folder / "decoder" / "metrics.json").read_text()
    assert train_both(folder) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (folder / "decoder" / "metrics.json").read_text() == before


def test_one_folder_for_both_stages_is_refused(tmp_path, capsys):
    place = f"train_decoder.train.save_dir_root={tmp_path / 'rqvae'}"
    config = [str(CONFIGS / "decoder.gin"), *overrides(tmp_path, *TINY_DECODER, place)]
    assert main(train_decoder.train, "train_decoder", config) == 2
    assert "Give each a folder of its own" in capsys.readouterr().err


def test_a_wrong_input_dim_is_refused_before_training(tmp_path, capsys):
    arguments = [str(CONFIGS / "rqvae.gin"), *overrides(tmp_path, "RqVaeConfig.input_dim=64")]
    assert main(train_rqvae.train, "train_rqvae", arguments) == 2
    assert "Set RqVaeConfig.input_dim = 128" in capsys.readouterr().err


def test_a_collapsed_codebook_stops_the_run(tmp_path, capsys):
    arguments = [str(CONFIGS / "rqvae.gin"), *overrides(tmp_path, "train_rqvae.train.min_codebook_use=1.0")]
    arguments.append("--gin.RqVaeConfig.codebook_sizes=(900, 900)")
    assert main(train_rqvae.train, "train_rqvae", arguments) == 2
    assert "codebook collapse: level" in capsys.readouterr().err
    assert not (tmp_path / "rqvae" / "model").exists()


def test_recommendations_come_out_as_items(folder):
    recommender = Recommender.from_pretrained(folder / "decoder")
    keys = recommender.catalogue.item_keys
    (items,) = recommender.recommend([[keys[3], keys[8]]], k=5, exclude_seen=True)
    assert len({item.item_key for item in items}) == 5
    assert not {keys[3], keys[8]} & {item.item_key for item in items}
    assert all(item.title for item in items)


def test_the_demo_shows_everything_and_reuses_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RUN", folder / "decoder")
    monkeypatch.setattr(demo, "TOKENIZER_RUN", folder / "rqvae")
    monkeypatch.setattr(demo, "train", lambda again: pytest.fail("trained again"))
    assert demo.main([]) == 0
    shown = capsys.readouterr().out
    for expected in ("Semantic ids", "step     6", "oracle", "of the oracle", "shopper 5 bought", "metrics.json"):
        assert expected in shown


def test_a_legacy_tokenizer_needs_features(folder, monkeypatch):
    prepared = type("Prepared", (), {"catalogue": None})()
    monkeypatch.setattr(train_decoder, "is_legacy", lambda path: True)
    with pytest.raises(InputError, match=r"train_decoder\.train\.features"):
        train_decoder.load_tokenizer("old/rqvae", prepared, None, RunOptions(), "runs/decoder")


@pytest.mark.slow
def test_the_scripts_run_as_programs(tmp_path):
    command = [sys.executable, "train_rqvae.py", str(CONFIGS / "rqvae.gin"), *overrides(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "100.0% after collisions were handled" in done.stdout
    wrong = subprocess.run([*command, "--gin.train.batchsize=3"], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "batch_size" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def rqvae_task(mode: QuantizeMode) -> RqVaeTask:
    features = torch.arange(40, dtype=torch.float32).view(10, 4).numpy()
    return RqVaeTask(
        train_rqvae.RqVae(train_rqvae.RqVaeConfig(input_dim=4, hidden_dims=(4,), codebook_sizes=(2,), mode=mode)),
        features,
        np.arange(10),
        np.arange(10),
        item_keys=[f"item-{row}" for row in range(10)],
        settings=tokenizer_settings(batch_size=3, temperature=(1.0, 0.01)),
        num_batches=10,
    )


def test_the_task_draws_the_same_batch_for_the_same_step():
    task = rqvae_task(QuantizeMode.GUMBEL_SOFTMAX)
    torch.testing.assert_close(task.batch(7).drawn, task.batch(7).drawn, rtol=0, atol=0)


def test_the_items_of_a_step_are_those_of_its_batch():
    task = rqvae_task(QuantizeMode.ROTATION_TRICK)
    first_features = task.batch(5).drawn[:, 0].tolist()
    assert task.item_keys(5) == [f"item-{int(value) // 4}" for value in first_features]
    retrieval = retrieval_task(fixed_capacity=True)
    packed = retrieval._batches.batch(2)
    held = {*packed.item_ids[: packed.offsets[-1]].tolist(), *packed.targets.tolist()}
    assert {int(key.removeprefix("item-")) for key in retrieval.item_keys(2)} == held


def test_the_temperature_is_annealed_in_tensors_that_a_recording_reads_anew():
    task = rqvae_task(QuantizeMode.GUMBEL_SOFTMAX)
    temperatures = torch.stack([task.batch(step).temperature for step in (0, 5, 10, 99)])
    torch.testing.assert_close(temperatures, torch.tensor([1.0, 0.1, 0.01, 0.01]))
    assert rqvae_task(QuantizeMode.STRAIGHT_THROUGH).batch(5).temperature is None
