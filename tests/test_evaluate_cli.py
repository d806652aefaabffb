import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
from data.batching import cold_items
from data.processed import DatasetConfig, RecDataset, TablesConfig, find_prepared, load_dataset
from data.schemas import InputError
from evaluation.metrics import METRICS
from modules.artifact import load_model_artifact, save_model_artifact
from modules.baselines.popularity import PopularityRanker
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.sequential.sasrec import SASRec, SASRecConfig
from tasks.protocol import EvaluationProtocol
from tests.tiny_dataset import (
    MODEL_SIZES,
    NUM_COLD_TEST,
    NUM_ITEMS,
    NUM_USERS,
    random_tokenizer,
    walks,
    write_interactions,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def save_artifact(folder: Path, config: DatasetConfig) -> None:
    """A random model, which is enough to be evaluated."""
    tokenizer = random_tokenizer(config)
    model = EncoderDecoderRetrievalModel(
        RetrievalModelConfig(languages={"text": tokenizer.level_sizes}, num_user_buckets=10, **MODEL_SIZES)
    )
    extra = {"dataset": config.to_dict(), "dataset_manifest_hash": load_dataset(config).manifest_hash}
    save_model_artifact(folder, model, tokenizer, extra, ranker_settings={"beam_width": 30, "max_history": 3})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_interactions(folder / "log.csv")
    config = walks(folder / "dataset", folder / "log.csv")
    save_artifact(folder / "model", config)
    return folder


def test_evaluates_the_model_beside_baselines(run_folder, tmp_path, capsys):
    outputs = ["--json", str(tmp_path / "new" / "m.json"), "--ranks", str(tmp_path / "ranks.safetensors")]
    assert evaluate.main([str(run_folder), "--batch-size", "16", *outputs]) == 0
    table = capsys.readouterr().out
    assert "generative" in table.splitlines()[1]
    assert "item_knn" in table.splitlines()[1]
    metrics = json.loads((tmp_path / "new" / "m.json").read_text())
    for ranker in ("generative", "popularity", "item_knn"):
        assert metrics[f"{ranker}/test/all/count"] == NUM_USERS
        assert metrics[f"{ranker}/test/cold/count"] == NUM_COLD_TEST
        assert metrics[f"{ranker}/test/warm/count"] == NUM_USERS - NUM_COLD_TEST
        for metric in METRICS:
            value = metrics[f"{ranker}/test/all/{metric}"]
            assert metrics[f"{ranker}/test/all/{metric}_ci95_low"] <= value
            assert value <= metrics[f"{ranker}/test/all/{metric}_ci95_high"]
    assert metrics["item_knn/test/warm/recall@10"] > 0.8  # a walk's next item is bought with the last ones
    assert metrics["about"]["exclude_seen"] is True
    ranks = load_file(tmp_path / "ranks.safetensors")
    assert sorted(ranks) == ["ranks/generative", "ranks/item_knn", "ranks/popularity", "rows", "targets"]
    assert ranks["rows"].tolist() == list(range(NUM_USERS))
    hits = (ranks["ranks/generative"] > 0).float().mean()
    assert metrics["generative/test/all/recall@20"] == pytest.approx(float(hits))


def test_valid_split_without_baselines(run_folder, tmp_path, capsys):
    path = tmp_path / "metrics.json"
    arguments = [
        str(run_folder / "model"),
        "--split",
        "valid",
        "--no-baselines",
        "--no-exclude-seen",
        "--json",
        str(path),
    ]
    assert evaluate.main(arguments) == 0
    metrics = json.loads(path.read_text())
    assert {key.split("/")[0] for key in metrics} == {"generative", "about"}
    assert {key.split("/")[1] for key in metrics if key != "about"} == {"valid"}
    assert metrics["about"]["exclude_seen"] is False
    assert "valid, walks" in capsys.readouterr().out


def test_two_evaluations_agree(run_folder, tmp_path):
    contents = []
    for batch_size in ("7", "64"):
        path = tmp_path / f"{batch_size}.json"
        evaluate.main([str(run_folder), "--batch-size", batch_size, "--json", str(path)])
        contents.append(json.loads(path.read_text()))
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_processes_share_an_evaluation_and_every_one_gets_what_one_alone_would(run_folder, tmp_path, capsys):
    """Of evaluate.py, of training's validation and of an RQ-VAE's; each process alone says what it worked on."""

    def options(name):
        return ["--batch-size", "16", "--json", str(tmp_path / f"{name}.json"), "--ranks", str(tmp_path / name)]

    assert evaluate.main([str(run_folder), *options("one")]) == 0
    table = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
         "tests.evaluation.script_shared", str(tmp_path), str(run_folder), *options("two")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == table
    assert done.stderr.count("generative (test):   0%") == 1  # one process shows its bar
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.json",
        "1.json",
        "one",
        "one.json",
        "two",
        "two.json",
    ]

    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    for part in ("ranked", "quantized"):
        assert first[part]["shared"]["metrics"] == first[part]["alone"]["metrics"]
        assert second[part]["shared"]["metrics"] == first[part]["alone"]["metrics"]
    assert first["ranked"]["alone"]["rows"] == [9, 9, 9, 9, 4]
    assert [told["ranked"]["shared"]["rows"] for told in (first, second)] == [[9, 9, 4], [9, 9]]
    assert [told["ranked"]["one_user"]["rows"] for told in (first, second)] == [[1], []]
    assert second["ranked"]["one_user"]["metrics"]["low_ids/test/all/count"] == 1
    assert [told["quantized"]["shared"]["rows"] for told in (first, second)] == [[16, 16, 8], [4, 16]]
    in_one_block = first["quantized"]["alone_in_one_block"]["metrics"]
    assert first["quantized"]["shared"]["metrics"] == pytest.approx(in_one_block)  # a small block weighs by its rows
    assert [told["ranked"]["error"] for told in (first, second)] == ["process 1 has no luck"] * 2
    assert "could not be written" in second["ranked"]["unwritable"] == first["ranked"]["unwritable"]


@pytest.fixture(scope="module")
def liger(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with a dense head, of the same data; its beams are 5."""
    config = walks(run_folder / "dataset", run_folder / "log.csv")
    tokenizer, dataset = random_tokenizer(config), load_dataset(config)
    cold = cold_items(dataset.histories, dataset.split(config.split), NUM_ITEMS)
    items = ItemTable(torch.randn(NUM_ITEMS, 4), torch.zeros(NUM_ITEMS, dtype=torch.bool), cold)
    sizes = RetrievalModelConfig(
        languages={"text": tokenizer.level_sizes},
        num_user_buckets=10,
        items=ItemInputConfig(num_features=4, hidden_dims=(), num_positions=3),
        embedding_loss_weight=1.0,
        **MODEL_SIZES,
    )
    extra = {"dataset": config.to_dict(), "dataset_manifest_hash": dataset.manifest_hash}
    settings = {"beam_width": 5, "max_history": 3, "mode": "hybrid@4"}
    folder = tmp_path_factory.mktemp("liger")
    model = EncoderDecoderRetrievalModel(sizes)
    save_model_artifact(folder / "model", model, tokenizer, extra, ranker_settings=settings, items=items)
    return str(folder)


@pytest.fixture(scope="module")
def sequence_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random SASRec of the same data, whose artifact has no tokenizer."""
    config = walks(run_folder / "dataset", run_folder / "log.csv")
    dataset = load_dataset(config)
    extra = {"dataset": config.to_dict(), "dataset_manifest_hash": dataset.manifest_hash}
    model = SASRec(SASRecConfig(num_items=NUM_ITEMS, d_model=8, max_history=3))
    folder = tmp_path_factory.mktemp("sasrec")
    save_model_artifact(folder / "model", model, dataset.catalogue, extra, ranker_settings={}, system="sasrec")
    return str(folder)


def test_modes_stand_in_one_table(liger, tmp_path, capsys):
    modes = ["generative", "dense", "hybrid@4", "hybrid@20"]
    path = tmp_path / "m.json"
    arguments = [liger, "--mode", "generative", "dense", "hybrid@4", "hybrid", "--beam-width", "20"]
    assert evaluate.main([*arguments, "--json", str(path)]) == 0
    head = capsys.readouterr().out.splitlines()[1].split()
    assert [name for name in head if name in (*modes, "popularity", "item_knn")] == [*modes, "popularity", "item_knn"]
    metrics = json.loads(path.read_text())
    assert metrics["about"]["rankers"] == modes
    assert (metrics["about"]["system"], metrics["about"]["beam_width"], metrics["about"]["max_history"]) == (
        "retrieval",
        20,
        3,
    )
    assert metrics["generative/test/cold/count"] == metrics["hybrid@4/test/cold/count"] == NUM_COLD_TEST
    assert evaluate.main([liger, "--no-baselines", "--json", str(path)]) == 0
    own = json.loads(path.read_text())
    assert {key.split("/")[0] for key in own} == {"about", "hybrid@4"}


def test_a_model_without_semantic_ids_is_evaluated(sequence_run, tmp_path, capsys):
    path = tmp_path / "m.json"
    assert evaluate.main([sequence_run, "--json", str(path)]) == 0
    metrics = json.loads(path.read_text())
    assert metrics["sasrec/test/all/count"] == NUM_USERS
    assert (metrics["about"]["system"], metrics["about"]["rankers"], metrics["about"]["beam_width"]) == (
        "sasrec",
        ["sasrec"],
        None,
    )


def test_a_baseline_is_not_put_beside_itself(run_folder, tmp_path, capsys):
    config = walks(run_folder / "dataset", run_folder / "log.csv")
    dataset = load_dataset(config)
    popularity = PopularityRanker.fit(dataset.histories, dataset.split(config.split).train, NUM_ITEMS)
    extra = {"dataset": config.to_dict(), "dataset_manifest_hash": dataset.manifest_hash}
    save_model_artifact(
        tmp_path / "model", popularity, dataset.catalogue, extra, ranker_settings={}, system="popularity"
    )
    assert evaluate.main([str(tmp_path)]) == 0
    head = capsys.readouterr().out.splitlines()[1].split()
    assert (head.count("popularity"), head.count("item_knn")) == (1, 1)


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("run_folder", ["--mode", "dense"], "dense retrieval needs a model with a dense head"),
        ("liger", ["--mode", "dense", "hybrid@50"], "hybrid@50 takes the first 50 of only 5 beams. Give --beam-width"),
        ("liger", ["--mode", "sparse"], "unknown retrieval mode 'sparse'; valid modes: generative, dense, hybrid"),
        ("liger", ["--mode", "hybrid", "hybrid@20", "--beam-width", "20"], "expected every retrieval mode once"),
        ("liger", ["--mode", "dense", "--beam-width", "9"], "dense searches no beams, got beam_width 9"),
        ("sequence_run", ["--mode", "generative"], "a 'sasrec' model ranks in one way and has no retrieval modes"),
        ("sequence_run", ["--beam-width", "9"], "the ranker of a 'sasrec' model has no beam_width"),
    ],
)
def test_what_a_model_cannot_is_one_line_and_exit_code_2(run, arguments, message, request, capsys):
    assert evaluate.main([str(request.getfixturevalue(run)), *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert message in streams.err


def test_an_evaluation_draws_nothing(run_folder):
    """Its numbers depend on no seed, and training goes on behind it as if it had not been."""
    dataset = load_dataset(walks(run_folder / "dataset", run_folder / "log.csv"))
    protocol = EvaluationProtocol.of(dataset, "leave_one_out", max_history=3)
    rankers = [load_model_artifact(run_folder).make_ranker(), *protocol.baselines()]
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    protocol.evaluate(rankers, "valid", max_users=7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_another_dataset_is_refused(run_folder, tmp_path):
    """Same name, other interactions: item ids would mean other items."""
    other = tmp_path / "other.csv"
    write_interactions(other)
    other.write_text(other.read_text() + "u3,i5,11\n")
    config = walks(tmp_path / "dataset", other)
    load_dataset(config)
    manifest = {"dataset": config.to_dict(), "dataset_manifest_hash": "0" * 64}
    with pytest.raises(InputError, match=r"not the dataset that the model was trained on.*--dataset-root"):
        evaluate.matching_dataset(evaluate.dataset_config(manifest, root=None, raw_dir=None), manifest)


def test_a_catalogue_that_was_changed_after_training_is_refused(run_folder, tmp_path, capsys):
    artifact = load_model_artifact(run_folder)
    removed = artifact.tokenizer.without_items(artifact.tokenizer.catalogue.item_keys[:1])
    artifact.with_catalogue(removed).save(tmp_path / "model")
    assert evaluate.main([str(tmp_path / "model")]) == 2
    assert "catalogue was changed after training (version 2" in capsys.readouterr().err


def test_dataset_config_from_a_manifest():
    fields = {
        "dataset": "tables",
        "split": "liger",
        "tables": {"interactions": "a.csv", "items": "b.csv", "text_columns": ["brand"]},
    }
    config = evaluate.dataset_config({"dataset": fields}, root="elsewhere", raw_dir=None)
    tables = TablesConfig(interactions="a.csv", items="b.csv", text_columns=("brand",))
    assert config == DatasetConfig(dataset=RecDataset.TABLES, split="liger", root="elsewhere", tables=tables)


@pytest.mark.parametrize("manifest", [{}, {"dataset": "beauty"}, {"dataset": {"category": "beauty"}}])
def test_a_manifest_without_a_dataset_is_refused(manifest):
    with pytest.raises(InputError, match="does not say on which dataset"):
        evaluate.dataset_config(manifest, root=None, raw_dir=None)


@pytest.mark.parametrize("fields", [{"dataset": "beuaty"}, {"dataset": "demo", "sead": 1}])
def test_a_manifest_of_another_library_is_refused(fields):
    with pytest.raises(InputError, match="describe no dataset of this library"):
        evaluate.dataset_config({"dataset": fields}, root=None, raw_dir=None)


@pytest.mark.parametrize("option", ["--json", "--ranks"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place, problem in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "m", f"{tmp_path / 'file'} is not a folder"),
    ):
        assert evaluate.main(["no/artifact", option, str(place)]) == 2
        assert capsys.readouterr().err == f"error: cannot write {place}: {problem}. Choose another {option}.\n"
    evaluate.check_writable(tmp_path / "new" / "folder" / "m.json", option)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fails_is_an_input_error_and_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    path.write_text("older")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*m\.json: the disk is full\. Choose another --json"):
        evaluate.write_json(path, {})
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_prepared_dataset_is_used_although_its_raw_file_has_changed(tmp_path):
    """And stays as it is: preparing again would replace the only copy of what the model was trained on."""
    log = tmp_path / "log.csv"
    write_interactions(log)
    config = walks(tmp_path / "dataset", log)
    trained_on = load_dataset(config).manifest_hash
    manifest = {"dataset": config.to_dict(), "dataset_manifest_hash": trained_on}
    log.write_text(log.read_text() + "u3,i5,11\n")
    assert evaluate.matching_dataset(config, manifest).manifest_hash == trained_on
    with pytest.raises(InputError, match="not the dataset that the model was trained on"):
        evaluate.matching_dataset(config, manifest | {"dataset_manifest_hash": "0" * 64})
    assert find_prepared(config).manifest_hash == trained_on
    elsewhere = replace(config, root=str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="not the dataset that the model was trained on"):
        evaluate.matching_dataset(elsewhere, manifest)


def test_a_drawn_part_of_the_users_is_always_the_same(run_folder, tmp_path):
    dataset = load_dataset(walks(run_folder / "dataset", run_folder / "log.csv"))
    protocol = EvaluationProtocol.of(dataset, "leave_one_out", max_history=3)
    rows = []
    for path in (tmp_path / "a", tmp_path / "b"):
        metrics = protocol.evaluate(protocol.baselines(), "valid", max_users=7, seed=5, ranks_path=path)
        assert metrics["popularity/valid/all/count"] == 7
        rows.append(load_file(path)["rows"].tolist())
    assert rows[0] == rows[1] == sorted(set(rows[0]))
    assert rows[0] != list(range(7))
    for nobody in (0, -3):
        with pytest.raises(InputError, match=f"at least 1 user .* got max_users = {nobody}"):
            protocol.evaluate(protocol.baselines(), "valid", max_users=nobody)


def test_exit_codes_and_streams(run_folder, tmp_path, capsys):
    assert evaluate.main([str(run_folder), "--no-baselines"]) == 0
    assert capsys.readouterr().out.startswith("test, walks, leave_one_out: 30 items ranked, seen items excluded")
    assert evaluate.main([str(run_folder), "--split", "train"]) == 2
    assert evaluate.main([str(run_folder), "--batch-size", "0"]) == 2
    assert evaluate.main([str(run_folder), "--device", "abacus"]) == 2
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "nothing")]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert len(streams.err.strip().splitlines()) == 1


def test_help_imports_nothing_heavy():
    code = "import sys, evaluate; code = evaluate.main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "RUN_OR_ARTIFACT" in done.stdout


def test_runs_as_a_script():
    command = [sys.executable, "evaluate.py", "--help"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "RUN_OR_ARTIFACT" in result.stdout
