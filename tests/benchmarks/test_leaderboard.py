import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import REPOSITORY
from benchmarks.leaderboard import __main__ as leaderboard
from benchmarks.leaderboard import board, facts
from benchmarks.leaderboard.board import build_rows, value_groups
from benchmarks.leaderboard.models import MODELS, Config, find_configs
from benchmarks.leaderboard.runs import run_python
from benchmarks.leaderboard.saved import SavedRanks, Users
from data.schemas import InputError
from evaluation.metrics import HIGH, LOW, sliced_metrics
from tests.benchmarks.leaderboard_fakes import FakeScripts, fake_artifact, write_configs
from tests.tiny_dataset import NUM_COLD_TEST, NUM_USERS


class Boards:
    """Runs the command line on fake scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.scripts = FakeScripts(folder / "data")
        configs = write_configs(folder / "configs")
        monkeypatch.setattr(leaderboard, "find_configs", partial(find_configs, configs=configs))
        monkeypatch.setattr(board, "NUM_SAMPLES", 200)
        monkeypatch.setattr(facts, "load_model_artifact", fake_artifact)

    def run(self, *arguments: str) -> int:
        places = ["--output", str(self.folder / "out"), "--results", str(self.folder / "results"), "--device", "cpu"]
        return leaderboard.main(["--dataset", "demo", *places, *arguments], command=self.scripts)

    def file(self, ending: str) -> Path:
        (path,) = self.folder.glob(f"results/*/leaderboard/demo{ending}")
        return path

    def rows(self, case: str) -> list[dict]:
        return [row for row in json.loads(self.file(".json").read_text())["rows"] if row["case"] == case]


@pytest.fixture
def boards(tmp_path, monkeypatch):
    return Boards(tmp_path, monkeypatch)


ALL = ("--models", "popularity", "sasrec", "liger", "--seeds", "0", "1")


def test_a_board_from_the_command_line(boards, capsys):
    assert boards.run(*ALL, "--minutes", "2.5", "--threads", "1") == 0
    started = [(script, Path(gin[f"{script}.train.save_dir_root"]).parts[-2:]) for script, gin in boards.scripts.calls]
    assert started == [
        ("fit_baseline", ("popularity", "seed_0")),  # its seed does not matter: once
        ("train_sequence", ("sasrec", "seed_0")),
        ("train_decoder", ("liger", "seed_0")),
        ("train_sequence", ("sasrec", "seed_1")),
        ("train_decoder", ("liger", "seed_1")),
    ]
    assert boards.scripts.environments[0] == {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    budgets = [[name for name in gin if name.endswith("max_minutes")] for _, gin in boards.scripts.calls]
    assert budgets[:3] == [[], ["LoopConfig.max_minutes"], ["decoder/LoopConfig.max_minutes"]]
    tokenizers = {gin.get("train_rqvae.train.save_dir_root") for script, gin in boards.scripts.calls if "dec" in script}
    assert tokenizers == {str(boards.folder / "out" / "runs" / "tokenizers" / "demo-rqvae")}

    measured = {row["implementation"]: row for row in boards.rows("measured")}
    assert list(measured) == ["popularity", "sasrec", "liger/generative", "liger/dense", "liger/hybrid@20"]
    assert measured["sasrec"]["run"]["seeds"] == [0, 1]
    expected = {"parameters": 6, "budget_minutes": 2.5, "training_minutes": [1.5, 1.5], "hardware": "Abacus"}
    assert expected.items() <= measured["sasrec"]["run"].items()
    assert measured["sasrec"]["run"]["commits"] == ["0123456+changes"]
    assert measured["popularity"]["run"]["budget_minutes"] is None
    assert measured["popularity"]["run"]["stores"] == "a count per item"
    (head,) = boards.rows("board")
    assert head["users"] == {"all": NUM_USERS, "warm": NUM_USERS - NUM_COLD_TEST, "cold": NUM_COLD_TEST}
    assert head["best_baseline"] == "sasrec"
    assert measured["sasrec"]["against_best_baseline"] is None
    assert measured["liger/dense"]["against_best_baseline"]["cold"]["ndcg@10"]["count"] == NUM_COLD_TEST
    assert {(row["implementation"], row["minus"], row["slice"]) for row in boards.rows("difference")} == {
        ("liger/hybrid@20", "liger/generative", part) for part in ("all", "cold")
    }
    printed = capsys.readouterr().out
    assert "| liger/hybrid@20 | 0." in printed
    page = (boards.folder / "out" / "demo.html").read_text()
    assert "ndcg@10 by popularity of the target" in page
    assert (boards.folder / "out" / "demo.md").read_text().strip() in printed


def test_every_number_follows_from_the_saved_ranks(boards, capsys):
    assert boards.run(*ALL) == 0
    assert boards.run("--recompute") == 0
    assert "5 rows computed again: every number follows" in capsys.readouterr().out

    path = boards.file(".ranks.safetensors")
    ranks = load_file(path)
    name = "ranks/liger/dense/seed_1"
    ranks[name][(ranks[name] > 10).nonzero()[0]] = 1
    save_file(ranks, path)
    assert boards.run("--recompute") == 1
    captured = capsys.readouterr()
    assert "numbers DIFFER" in captured.out
    lines = captured.err.splitlines()
    assert any("slices/all/recall@10/mean: " in line for line in lines)
    assert any("/history_length/" in line for line in lines)
    assert any("/against_best_baseline/all/" in line for line in lines)


def test_damaged_ranks_are_named(boards):
    assert boards.run("--models", "popularity") == 0
    path = boards.file(".ranks.safetensors")
    saved = load_file(path)
    ranks = saved["ranks/popularity/seed_0"]

    def refused(**damaged):
        save_file({**saved, **{name: tensor.clone() for name, tensor in damaged.items()}}, path)
        with pytest.raises(InputError) as caught:
            boards.run("--recompute")
        return str(caught.value)

    no_ranks = f"is not the ranks of {NUM_USERS} users"
    assert f"ranks/popularity/seed_0 {no_ranks}" in refused(**{"ranks/popularity/seed_0": ranks[:-1]})
    assert f"ranks/popularity/seed_0 {no_ranks}" in refused(**{"ranks/popularity/seed_0": ranks.float()})
    assert f"ranks/popularity {no_ranks}" in refused(**{"ranks/popularity": ranks})
    lengths = saved["history_length"]
    assert f"expected history_length of [{NUM_USERS}] users" in refused(history_length=lengths[:-1])


def test_a_number_that_does_not_follow_is_noticed(boards, capsys):
    assert boards.run("--models", "popularity", "sasrec") == 0
    path = boards.file(".json")
    published = path.read_text()

    def problems(change):
        result = json.loads(published)
        change(next(row for row in result["rows"] if row.get("implementation") == "sasrec"))
        path.write_text(json.dumps(result))
        capsys.readouterr()
        assert boards.run("--recompute") == 1
        return [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]

    def better(row):
        row["slices"]["all"]["ndcg@10"]["mean"] += 1e-6

    def surer(row):
        row["popularity"][1]["recall@10"]["high"] -= 0.001

    def larger(row):
        row["slices"]["cold"]["count"] += 1

    assert problems(better) == ["rows/2/slices/all/ndcg@10/mean"]
    assert problems(surer) == ["rows/2/popularity/1/recall@10/high"]
    assert problems(larger) == ["rows/2/slices/cold/count"]
    result = json.loads(published)
    result["rows"] = [row for row in result["rows"] if row.get("implementation") != "sasrec"]
    path.write_text(json.dumps(result))
    with pytest.raises(
        InputError, match="saved valid ranks are of popularity, sasrec, the table's rows are popularity"
    ):
        boards.run("--recompute")
    path.write_text(published)
    assert boards.run("--recompute") == 0


def test_metrics_of_one_seed_are_those_of_the_evaluator(boards):
    assert boards.run("--models", "liger") == 0
    ranks = load_file(boards.folder / "out" / "runs" / "liger" / "seed_0" / "ranks_test.safetensors")
    saved = SavedRanks.load(boards.file(".ranks.safetensors"))
    expected = sliced_metrics(ranks["ranks/dense"], saved.test.cold)
    row = next(row for row in boards.rows("measured") if row["implementation"] == "liger/dense")
    for part in ("all", "warm", "cold"):
        for metric in ("recall@5", "recall@20", "ndcg@5", "ndcg@10"):
            assert row["slices"][part][metric]["mean"] == pytest.approx(expected[f"{part}/{metric}"], abs=1e-12)
            assert row["slices"][part][metric]["low"] == pytest.approx(expected[f"{part}/{metric}{LOW}"], abs=1e-12)
            assert row["slices"][part][metric]["high"] == pytest.approx(expected[f"{part}/{metric}{HIGH}"], abs=1e-12)
            assert row["slices"][part][metric]["std"] is None


def test_a_stopped_board_goes_on_where_it_was(boards):
    boards.scripts.stopping = {"liger"}
    with pytest.raises(KeyboardInterrupt):
        boards.run(*ALL)
    assert len(boards.scripts.calls) == 3
    assert not list(boards.folder.glob("results/**/*.json"))
    boards.scripts.stopping, boards.scripts.calls = set(), []
    assert boards.run(*ALL) == 0
    again = [Path(gin[f"{script}.train.save_dir_root"]).parts[-2:] for script, gin in boards.scripts.calls]
    assert again == [("liger", "seed_0"), ("sasrec", "seed_1"), ("liger", "seed_1")]


def test_a_failed_run_is_told_and_the_others_go_on(boards, capsys):
    boards.scripts.failing = {"sasrec"}
    assert boards.run(*ALL) == 1
    captured = capsys.readouterr()
    assert "failed: sasrec, seed 1: error: the disk is full (exit code 2)" in captured.err
    assert "missing here: sasrec, seed 0: error: the disk is full" in captured.out
    assert {row["run"]["model"] for row in boards.rows("measured")} == {"popularity", "liger"}
    boards.scripts.failing = set()
    assert boards.run(*ALL) == 0
    assert len(boards.rows("measured")) == 5


def test_finished_runs_of_other_settings_are_not_taken_for_these(boards):
    assert boards.run("--models", "sasrec") == 0
    config = boards.folder / "configs" / "demo" / "sasrec.gin"
    config.write_text(f"# Expected: recall@10 0.1.\n{config.read_text()}")  # a comment changes nothing
    assert boards.run("--models", "sasrec") == 0
    assert len(boards.scripts.calls) == 1
    with pytest.raises(InputError, match="finished run of another config, budget or split"):
        boards.run("--models", "sasrec", "--minutes", "3")
    config.write_text(config.read_text() + "LoopConfig.num_steps = 5\n")
    with pytest.raises(InputError, match="finished run of another config, budget or split"):
        boards.run("--models", "sasrec")


def test_limited_time_is_compared_with_as_many_threads_alone(boards):
    models = ("--models", "popularity", "sasrec")
    assert boards.run(*models, "--threads", "2") == 0  # the config limits sasrec to 7 minutes
    with pytest.raises(InputError, match=r"sasrec.* was trained with 2 threads, .* Give --threads 2, remove it"):
        boards.run(*models, "--threads", "1")
    assert boards.run("--models", "popularity", "--threads", "1") == 0


def test_runs_on_other_data_cannot_share_a_board(boards):
    assert boards.run("--models", "popularity", "sasrec") == 0
    manifest = boards.folder / "out" / "runs" / "sasrec" / "seed_0" / "model" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"exclude_seen": true', '"exclude_seen": false'))
    with pytest.raises(
        InputError, match=r"must agree, but exclude_seen is True in .*popularity.* and False in .*sasrec"
    ):
        boards.run("--models", "popularity", "sasrec")


def test_missing_configs_are_named_with_what_there_is(tmp_path):
    for name in ("tiger_beauty", "tiger_beauty_minilm", "sasrec_beauty"):
        (tmp_path / f"{name}.gin").touch()
    found = find_configs(["sasrec", "tiger"], "beauty", "minilm", configs=tmp_path)
    assert {name: path.stem for name, path in found.items()} == {
        "sasrec": "sasrec_beauty",  # reads no features
        "tiger": "tiger_beauty_minilm",
    }
    with pytest.raises(InputError) as error:
        find_configs(["hstu", "tiger", "liger"], "beauty", "minilm", configs=tmp_path)
    assert "no config for" in str(error.value)
    assert "hstu_beauty.gin" in str(error.value)
    assert "liger_beauty_minilm.gin" in str(error.value)
    assert "On beauty there are: sasrec, tiger, tiger with --features minilm." in str(error.value)


def test_a_shipped_config_is_read_as_it_is_written():
    config = Config.read(REPOSITORY / "configs" / "demo" / "decoder.gin", MODELS["tiger"].script)
    assert (config.loop, config.tokenizer_loop, config.tokenizer) == ("decoder", "rqvae", "runs/demo/rqvae")


def test_published_rows_say_where_they_come_from(tmp_path):
    published = json.loads(leaderboard.PUBLISHED.read_text())
    for rows in published.values():
        for row in rows:
            assert row["source"]
            assert row["protocol"]
            for metrics in row["slices"].values():
                assert set(metrics) <= {f"{kind}@{cutoff}" for kind in ("recall", "ndcg") for cutoff in (5, 10)}
                assert all(0 <= value < 0.4 for value in metrics.values())
    names = {row["implementation"] for row in published["beauty"]}
    assert {"TIGER", "ActionPiece", "RPG", "BARGE"} <= names


def test_groups_by_hand():
    assert value_groups(torch.tensor([0, 0, 1, 1, 2, 3, 4, 9])) == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 9)]
    assert value_groups(torch.tensor([3, 3, 3, 3, 3, 8])) == [(3, 3), (4, 8)]
    assert value_groups(torch.tensor([0, 0])) == [(0, 0)]


def test_an_empty_slice_is_empty_and_not_zero():
    users = Users(*(torch.tensor([1, 2, 3], dtype=torch.int32) for _ in range(4)))
    saved = SavedRanks(users, users)
    for role, good, bad in (("valid", "sasrec", "popularity"), ("test", "popularity", "sasrec")):
        saved.add(role, good, 0, torch.tensor([1, 1, 1]))
        saved.add(role, bad, 0, torch.tensor([1, 0, 3]))
    facts_of = {name: {"kind": MODELS[name].kind, "model": name, "ranker": name} for name in ("popularity", "sasrec")}
    head, popularity, _ = build_rows({}, facts_of, saved)
    assert head["best_baseline"] == "sasrec"  # by validation, whatever test says
    assert popularity["against_best_baseline"]["all"]["recall@10"]["mean"] == pytest.approx(1 / 3)
    assert head["users"]["cold"] == 0
    assert popularity["slices"]["cold"] == {"count": 0}
    assert popularity["against_best_baseline"]["cold"]["ndcg@10"] == {"count": 0}
    assert [group["low"] for group in popularity["popularity"]] == [1, 2, 3]


def test_a_script_is_told_to_stop_when_the_board_is(tmp_path):
    """It hears SIGTERM, which a training answers with a checkpoint, and the board waits for it."""
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    script = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_):\n    time.sleep(0.2); pathlib.Path({str(stopped)!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt_when_ready():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Thread(target=interrupt_when_ready).start()
        with pytest.raises(KeyboardInterrupt):
            run_python(["-c", script], tmp_path / "log", {})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped.exists()


def test_a_script_runs_with_its_environment_and_its_log_is_added_to(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    code = run_python(
        ["-c", "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(3)"], log, {"OMP_NUM_THREADS": "1"}
    )
    assert code == 3
    assert log.read_text() == "before\n1\n"
