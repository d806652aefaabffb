import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.schemas import InputError
from training import run_folder
from training.run_folder import RunFolder, RunOptions

OPTIONS = RunOptions(config_text="train.seed = 1\n", operative_config="train.seed = 1  # x\n", command="python x.py")


def start(root, **changes):
    return RunFolder.open(root, RunOptions(**({"config_text": "a = 1\n"} | changes)), seed=7, data_manifest_hash="abc")


def finished_run(root):
    run = start(root)
    run.append_metrics({"step": 1, "loss": 2.0})
    run.write_metrics({"x": 1.0})
    (run.checkpoints / "step_00000001").mkdir()
    (run.checkpoints / "best.safetensors").write_bytes(b"best")
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    (run.report / "loss.png").write_bytes(b"png")
    return run


def test_a_new_run_records_what_was_asked_for_and_where_it_ran(tmp_path):
    run = RunFolder.open(tmp_path / "a/run", OPTIONS, seed=7, data_manifest_hash="abc")
    assert (run.root / "config.gin").read_text() == "train.seed = 1\n"
    assert (run.root / "operative_config.gin").read_text() == "train.seed = 1  # x\n"
    environment = json.loads((run.root / "env.json").read_text())
    assert environment["seed"] == 7
    assert environment["data_manifest_hash"] == "abc"
    assert environment["command"] == "python x.py"
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["hardware"]["cpu"]
    assert "commit" in environment
    assert run.checkpoints.is_dir()
    assert run.report.is_dir()


def test_a_second_run_is_refused_and_nothing_is_touched(tmp_path):
    run = finished_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    with pytest.raises(InputError, match=r"already holds a run. Continue it with --resume auto, replace it with --ov"):
        start(tmp_path, config_text="b = 2\n")
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run = finished_run(tmp_path)
    foreign = [run.root / "notes.txt", run.report / "notes.txt", run.checkpoints / "notes.txt", run.root / "rqvae/x"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    start(tmp_path, overwrite=True, config_text="b = 2\n")
    assert (run.root / "config.gin").read_text() == "b = 2\n"
    assert not run.metrics_log.exists()
    assert not (run.root / "metrics.json").exists()
    assert not run.model.exists()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["notes.txt"]
    assert sorted(path.name for path in run.report.iterdir()) == ["notes.txt"]
    assert all(path.read_text() == "mine" for path in foreign)


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": "auto"}])
def test_a_folder_that_no_run_wrote_is_never_touched(tmp_path, options):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.bin").write_text("mine")
    with pytest.raises(InputError, match=r"holds model but no run wrote it"):
        start(tmp_path, **options)
    assert (tmp_path / "model/weights.bin").read_text() == "mine"


def test_resume_keeps_everything(tmp_path):
    run = finished_run(tmp_path)
    start(tmp_path, resume="auto")
    start(tmp_path, resume=str(run.checkpoints / "step_00000001"))
    assert run.metrics_log.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert (run.model / "config.json").exists()


def test_a_checkpoint_of_another_run_does_not_open_this_one(tmp_path):
    finished_run(tmp_path / "one")
    finished_run(tmp_path / "two")
    with pytest.raises(InputError, match="two already holds a run"):
        start(tmp_path / "two", resume=str(tmp_path / "one/checkpoints/step_00000001"))


def test_resume_with_other_data_is_refused(tmp_path):
    finished_run(tmp_path)
    with pytest.raises(InputError, match=r"was trained on other data \(manifest abc, now xyz\)"):
        RunFolder.open(tmp_path, RunOptions(resume="auto"), seed=7, data_manifest_hash="xyz")


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, problem in ((tmp_path / "file", "File exists"), (tmp_path / "file/run", "Not a directory")):
        with pytest.raises(InputError, match=rf"train.save_dir_root = .* cannot be a folder: {path}: {problem}"):
            start(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write the run folder .*run: permission denied"):
        start(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot write the run folder .*run: the file system is read-only"):
        start(tmp_path / "run")


def test_metrics_are_valid_json_without_nan(tmp_path):
    run = start(tmp_path)
    run.append_metrics({"step": 1, "a": math.nan, "b": 1.5})
    run.write_metrics({"a": math.inf})
    assert json.loads(run.metrics_log.read_text()) == {"step": 1, "a": None, "b": 1.5}
    assert json.loads((run.root / "metrics.json").read_text()) == {"a": None}


def test_drop_metrics_after_a_step_also_drops_a_line_cut_short(tmp_path):
    run = start(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with run.metrics_log.open("a") as file:
        file.write('{"step": 2, "los')
    run.drop_metrics_after(2, evaluated_step=2)
    assert run.metrics_log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_that_was_refused_while_it_started_does_not_block_the_next(tmp_path):
    start(tmp_path)
    run = start(tmp_path, config_text="b = 2\n")
    assert (run.root / "config.gin").read_text() == "b = 2\n"


@pytest.mark.parametrize("name", ["config.gin", "metrics.json", "model"])
def test_a_crash_while_starting_or_replacing_leaves_a_folder_that_can_be_used_again(tmp_path, monkeypatch, name):
    finished_run(tmp_path)

    def crashing(function):
        def crash(path, *arguments, **keywords):
            if os.path.basename(path) == name:
                raise KeyboardInterrupt
            return function(path, *arguments, **keywords)

        return crash

    for owner, function in ((run_folder, "replace_file"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, function, crashing(getattr(owner, function)))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert start(tmp_path, overwrite=True).environment()["seed"] == 7


def test_overwrite_removes_the_ranks_of_the_earlier_run(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "ranks_test.safetensors").write_bytes(b"old")
    start(tmp_path, overwrite=True)
    assert not (tmp_path / "ranks_test.safetensors").exists()


def test_two_programs_never_train_in_one_folder(tmp_path):
    start(tmp_path)
    start(tmp_path, resume="auto")  # the same program may
    code = (
        "from training.run_folder import RunFolder, RunOptions\n"
        f"RunFolder.open({str(tmp_path)!r}, RunOptions(resume='auto'), seed=7, data_manifest_hash='abc')"
    )
    run = start(tmp_path, resume="auto")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"InputError: another program is training in {run.root}." in other.stderr


@pytest.mark.parametrize("root", ["", " "])
def test_an_empty_name_is_not_the_working_directory(root):
    with pytest.raises(InputError, match=r"train.save_dir_root is empty"):
        start(root)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_an_impossible_seed(tmp_path, seed):
    with pytest.raises(InputError, match=rf"train.seed expected 0 to 2147483647, got {seed}"):
        RunFolder.open(tmp_path / "run", OPTIONS, seed=seed)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_must_have_the_inputs_it_had(tmp_path):
    RunFolder.open(tmp_path / "run", RunOptions(), seed=0).require_same(tokenizer="abc")
    again = RunFolder.open(tmp_path / "run", RunOptions(resume="auto"), seed=0)
    again.require_same(tokenizer="abc")
    assert again.environment()["inputs"] == {"tokenizer": "abc"}
    with pytest.raises(InputError, match="trained with another tokenizer"):
        again.require_same(tokenizer="xyz")
    fresh = RunFolder.open(tmp_path / "run", RunOptions(overwrite=True), seed=0)
    fresh.require_same(tokenizer="xyz")
    assert fresh.environment()["inputs"] == {"tokenizer": "xyz"}
