"""What `train_rqvae.train` trains on, keeps and survives, from a file of features to artifacts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_rqvae
from data.features import FeatureConfig
from data.processed import DatasetConfig
from data.schemas import InputError
from modules.estimators import QuantizeMode
from modules.residual_kmeans import residual_kmeans
from modules.rqvae import RqVae
from modules.rqvae_config import ENCODERS, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.tiny_dataset import NUM_COLD_TEST, NUM_ITEMS, walks, write_interactions
from training.loop_config import LoopConfig
from training.run_folder import RunOptions

WIDTH = 6
KEYS = [f"i{number}" for number in range(NUM_ITEMS)]
EMA: dict[str, Any] = {"ema_decay": (0.8, 0.0), "restart_after": 2, "separation_weight": 1.0}


def random_rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_ITEMS, WIDTH)).astype(np.float32)


def feature_file(path: Path, rows: np.ndarray) -> FeatureConfig:
    np.save(path, rows)
    path.with_suffix(".keys.txt").write_text("\n".join(KEYS) + "\n")
    return FeatureConfig(encoder="file", path=str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_interactions(folder / "log.csv")
    return folder


def dataset(folder: Path, name: str = "walks") -> DatasetConfig:
    return walks(folder / "dataset", folder / "log.csv", name)


def train(folder: Path, run: Path, rows: np.ndarray, *, model: dict[str, Any] | None = None, **arguments: Any) -> Path:
    """The artifact of a run of 20 steps on features of the items."""
    config = {"embed_dim": 3, "hidden_dims": (8,), "codebook_sizes": (6, 5), "mode": QuantizeMode.STRAIGHT_THROUGH}
    loop = LoopConfig(num_steps=20, learning_rate=1e-2, eval_every=10, checkpoint_every=10, log_every=10)
    given = {"loop": loop, "batch_size": 8, "pretrain_steps": 10, "options": RunOptions(), **arguments}
    return train_rqvae.train(
        save_dir_root=str(run),
        dataset=dataset(folder),
        features=feature_file(run.with_suffix(".npy"), rows),
        model=RqVaeConfig(**{"input_dim": WIDTH, **config, **(model or {})}),
        **given,
    )


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    rqvae = SemanticIdTokenizer.from_pretrained(artifact).rqvae
    assert rqvae is not None
    return rqvae.state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_several_data_sets_share_a_quantizer_and_get_a_tokenizer_each(folder, tmp_path):
    first = train(folder, tmp_path / "run", random_rows(), more_datasets=(dataset(folder, "more"),), held_out=0.2)
    other = tmp_path / "run" / "more_models" / "more"
    assert_equal(weights(other), weights(first))
    tokenizers = [SemanticIdTokenizer.from_pretrained(path) for path in (first, other)]
    hashes = [tokenizer.manifest["dataset_manifest_hash"] for tokenizer in tokenizers]
    assert hashes[0] != hashes[1]
    assert torch.equal(tokenizers[0].codes, tokenizers[1].codes)  # the same items in both


@pytest.mark.parametrize("model", [{}, {"encoder": "identity"}], ids=["trained", "residual k-means"])
def test_what_is_trained_on_seen_items_knows_nothing_of_the_others(folder, tmp_path, model):
    rows = random_rows()
    changed = rows.copy()
    changed[-NUM_COLD_TEST:] += 50.0
    loop = LoopConfig(num_steps=10, learning_rate=1e-2, eval_every=10, checkpoint_every=10, log_every=10)
    seen, seen_changed, everything = (
        weights(train(folder, tmp_path / f"run{number}", values, model=model, loop=loop, train_on=train_on))
        for number, (values, train_on) in enumerate([(rows, "seen"), (changed, "seen"), (changed, "all")])
    )
    assert_equal(seen_changed, seen)
    assert not all(torch.equal(everything[name], tensor) for name, tensor in seen.items())


def test_residual_kmeans_trains_nothing(folder, tmp_path):
    rows = random_rows()
    artifact = train(folder, tmp_path / "run", rows, model={"encoder": "identity"})
    tokenizer = SemanticIdTokenizer.from_pretrained(artifact)
    order = [KEYS.index(key) for key in tokenizer.catalogue.item_keys]
    for found, expected in zip(tokenizer.rqvae.codebooks(), residual_kmeans(rows[order], (6, 5)), strict=True):
        assert torch.equal(found, expected)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 0


def test_the_weights_of_the_fewest_collisions_are_kept(folder, tmp_path):
    loop = LoopConfig(num_steps=30, learning_rate=3e-2, eval_every=3, checkpoint_every=30, log_every=10)
    train(folder, tmp_path / "run", random_rows(), loop=loop, select_by="collisions")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ratios = {one["step"]: one["codebook/unique_ratio"] for one in records if "codebook/unique_ratio" in one}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(set(ratios.values())) > 1
    assert metrics["best_step"] == max(ratios, key=lambda step: (ratios[step], -step))
    assert metrics["codebook/unique_ratio"] == max(ratios.values())


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
    arguments: dict[str, Any] = {"model": EMA, "neighbours_together": 4}
    train(folder, tmp_path / "whole", random_rows(), **arguments)
    evaluate, seen = train_rqvae.RqVaeTask.evaluate, []

    def cut_off(self, model):
        seen.append(model)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(self, model)

    monkeypatch.setattr(train_rqvae.RqVaeTask, "evaluate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "cut", random_rows(), **arguments)
    assert not (tmp_path / "cut" / "model").exists()
    train(folder, tmp_path / "cut", random_rows(), options=RunOptions(resume="auto"), **arguments)
    states = [
        torch.load(tmp_path / run / "checkpoints" / "step_00000020" / "state.pt", weights_only=False)["model"]
        for run in ("cut", "whole")
    ]
    assert "quantizers.0.ema_sums" in states[0]
    assert "quantizers.1.idle_steps" in states[0]
    assert_equal(*states)
    assert_equal(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_an_all_but_dead_codebook_recovers_or_stops_the_run(folder, tmp_path, monkeypatch, ema_decay):
    initialize = RqVae.initialize_codebooks_

    def all_but_one_far_away(self, x, **arguments):
        initialize(self, x, **arguments)
        for quantizer in self.quantizers:
            codes = quantizer.weight.detach().clone()
            codes[1:] += 1e4
            quantizer.set_codes_(codes)

    monkeypatch.setattr(RqVae, "initialize_codebooks_", all_but_one_far_away)
    with pytest.raises(InputError, match=r"codebook collapse: level 0 uses 1 of 6 codes.*restart_after"):
        train(folder, tmp_path / "dead", random_rows(), model={"ema_decay": ema_decay})
    artifact = train(folder, tmp_path / "run", random_rows(), model={"ema_decay": ema_decay, "restart_after": 2})
    metrics = SemanticIdTokenizer.from_pretrained(artifact).manifest["metrics"]
    assert min(metrics["codebook/use_level_0"], metrics["codebook/use_level_1"]) >= 0.6


def test_broken_rows_are_named(folder, tmp_path):
    rows = random_rows()
    rows[7, 2] = np.nan
    with pytest.raises(InputError, match=r"NaN, infinite or missing numbers.*'i7'"):
        train(folder, tmp_path / "run", rows)


def test_items_that_are_all_alike_stop_the_run(folder, tmp_path):
    with pytest.raises(InputError, match=r"codebook collapse.*nearly identical item features"):
        train(folder, tmp_path / "run", np.ones((NUM_ITEMS, WIDTH), dtype=np.float32), min_codebook_use=0.5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_fewer_items_than_codes_and_duplicates(folder, tmp_path, encoder):
    rows = random_rows()
    rows[15:] = rows[:15]
    model = {"encoder": encoder, "codebook_sizes": (64, 64), "restart_after": 2}
    artifact = train(folder, tmp_path / "run", rows, model=model, min_codebook_use=0.02)
    tokenizer = SemanticIdTokenizer.from_pretrained(artifact)
    assert len(tokenizer.semantic_ids.unique(dim=0)) == NUM_ITEMS
    assert len(tokenizer.codes.unique(dim=0)) <= 15
