"""A stranger's two csv files through the shipped configs, as on the command line."""

from pathlib import Path

import numpy as np
import pytest

import train_rqvae
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from training.cli import main

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tables" / "rqvae.gin"
NUM_ITEMS = NUM_USERS = 40
SHORT = (
    "rqvae/LoopConfig.num_steps=4",
    "rqvae/LoopConfig.eval_every=4",
    "rqvae/LoopConfig.warmup_steps=1",
    "train.pretrain_steps=2",
    "train.min_codebook_use=0.01",
    "RqVaeConfig.hidden_dims=(8,)",
    "RqVaeConfig.codebook_sizes=(8, 8)",
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    bought = [(user, (user + 7 * place) % NUM_ITEMS, place) for user in range(NUM_USERS) for place in range(8)]
    (tmp_path / "log.csv").write_text(
        "customer,sku,day\n" + "".join(f"c{u},{i:03},2020-01-{p + 1:02}\n" for u, i, p in bought)
    )
    colours = ("red", "green", "blue")
    rows = [f"{item:03},thing {item},{colours[item % 3]} shop" for item in range(NUM_ITEMS)]
    (tmp_path / "items.csv").write_text("\n".join(["sku,title,maker", *rows]) + "\n")
    return tmp_path


def run(files: Path, *settings: str) -> int:
    given = (
        f"DatasetConfig.raw_dir={files}",
        f"DatasetConfig.root={files / 'dataset'}",
        f"train.save_dir_root={files / 'run'}",
        "TablesConfig.interactions=log.csv",
        "TablesConfig.items=items.csv",
        "TablesConfig.user_column=customer",
        "TablesConfig.item_column=sku",
        "TablesConfig.time_column=day",
    )
    return main(
        train_rqvae.train, "train_rqvae", [str(CONFIG), *(f"--gin.{line}" for line in (*given, *SHORT, *settings))]
    )


def test_files_are_asked_for(capsys):
    assert main(train_rqvae.train, "train_rqvae", [str(CONFIG)]) == 2
    assert (
        "TablesConfig.interactions is required. Set it: --gin.TablesConfig.interactions=VALUE"
        in capsys.readouterr().err
    )


def test_text_features(files, capsys):
    code = run(files, "TablesConfig.text_columns=('maker',)", "FeatureConfig.dim=16", "RqVaeConfig.input_dim=16")
    assert code == 0, capsys.readouterr().err
    tokenizer = SemanticIdTokenizer.from_pretrained(files / "run" / "model")
    assert tokenizer.catalogue.item_keys == [f"{item:03}" for item in range(NUM_ITEMS)]
    assert tokenizer.catalogue.titles[7] == "thing 7"


def test_own_embeddings_without_an_items_file(files, capsys):
    np.save(files / "own.npy", np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)))
    (files / "own.keys.txt").write_text("".join(f"{item:03}\n" for item in range(NUM_ITEMS)))
    none = ("TablesConfig.items=None", "TablesConfig.title_column=None")
    own = ("FeatureConfig.encoder=file", f"FeatureConfig.path={files / 'own.npy'}", "RqVaeConfig.input_dim=6")
    assert run(files, *none, *own) == 0, capsys.readouterr().err
    assert SemanticIdTokenizer.from_pretrained(files / "run" / "model").num_items == NUM_ITEMS


def test_the_wrong_column_is_one_line_and_no_run(files, capsys):
    assert run(files, "TablesConfig.time_column=date") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("log.csv has no column 'date'; columns: customer, sku, day.")
    assert not (files / "run").exists()
