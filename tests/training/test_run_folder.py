import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.schemas import InputError
from tests.training.small_disks import small_files
from training import run_folder
from training.config_changes import Setting
from training.run_folder import RunFolder, RunOptions

SETTING = Setting("train.seed", "1", "x")
OPTIONS = RunOptions(config_text="train.seed = 1\n", settings=(SETTING,), command="python x.py")


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


def setting(name, value, origin="c.gin:1", used_by=()):
    return Setting(name, str(value), origin, tuple(used_by))


def options(*settings, **changes):
    return RunOptions(config_text="a = 1\n", settings=settings, **changes)


def test_changed_settings_are_refused_before_anything_is_written(tmp_path):
    before = (setting("train.save_dir_root", "'a'"), setting("x/LoopConfig.num_steps", 4))
    now = (setting("train.save_dir_root", "'b'"), setting("x/LoopConfig.num_steps", 8, "command line"))
    run = RunFolder.open(tmp_path, options(*before), seed=7)
    RunFolder.open(tmp_path, options(*now, resume="auto"), seed=7)  # it had got nowhere
    RunFolder.open(tmp_path, options(*before, resume="auto"), seed=7)
    run.append_metrics({"step": 1})
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"x/LoopConfig.num_steps: 4 -> 8 \(command line\)\. Set them back"
        ) as caught:
            RunFolder.open(tmp_path, options(*now, resume="auto"), seed=7)
    assert "save_dir_root:" not in str(caught.value)
    assert (tmp_path / "operative_config.gin").read_text().endswith("x/LoopConfig.num_steps = 4  # c.gin:1\n")
    assert run.environment()["changes"] == []


def test_allowed_changes_are_kept_and_said(tmp_path, caplog):
    run = RunFolder.open(tmp_path, options(setting("a", 1)), seed=7)
    run.append_metrics({"step": 1})
    for value in (2, 2, 3):
        again = RunFolder.open(tmp_path, options(setting("a", value), resume="auto", allow_changes=True), seed=7)
        again.accept_changes()
    changes = [(change["before"], change["now"], change["origin"]) for change in run.environment()["changes"]]
    assert changes == [("1", "2", "c.gin:1"), ("2", "3", "c.gin:1")]
    assert [record.message for record in caplog.records] == [
        f"the run in {tmp_path} goes on with other settings: a: {change} (c.gin:1)" for change in ("1 -> 2", "2 -> 3")
    ]
    RunFolder.open(tmp_path, options(setting("a", 4), overwrite=True), seed=7)
    assert run.environment()["changes"] == []


def test_changes_that_come_to_nothing_are_not_recorded(tmp_path):
    """As when the checkpoint does not fit them: the run is still the one that it was."""
    run = RunFolder.open(tmp_path, options(setting("a", 1)), seed=7)
    run.append_metrics({"step": 1})
    RunFolder.open(tmp_path, options(setting("a", 2), resume="auto", allow_changes=True), seed=7)
    assert run.environment()["changes"] == []
    RunFolder.open(tmp_path, options(setting("a", 1), resume="auto"), seed=7)


def test_data_and_inputs_of_a_run_that_got_nowhere_bind_nobody(tmp_path):
    start(tmp_path, resume="auto").require_same(tokenizer="abc")
    again = RunFolder.open(tmp_path, RunOptions(resume="auto"), seed=7, data_manifest_hash="xyz")
    again.require_same(tokenizer="xyz")


def test_a_path_that_is_not_there_is_refused_before_anything_is_removed(tmp_path):
    run = finished_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"--resume .*/typo: no such folder"):
        start(run.root, resume=str(tmp_path / "typo"), overwrite=True)
    assert run.metrics_log.exists()


def test_a_run_whose_removal_was_cut_short_keeps_its_settings_as_long_as_its_checkpoints(tmp_path, monkeypatch):
    finished_run(tmp_path)
    (tmp_path / "operative_config.gin").write_text("a = 1  # c.gin:1\n")

    def crash(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "operative_config.gin").exists()
    assert not list((tmp_path / "checkpoints").glob("step_*"))  # whole or away, never half removed


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    run = start(tmp_path)
    for write in (lambda: run.append_metrics({"x": "x" * 5000}), lambda: run.write_metrics({"x": "x" * 5000})):
        with small_files(), pytest.raises(OSError, match=r"metrics\.json") as caught:
            write()
        assert "metrics.json" in caught.value.filename


def test_a_run_without_gin_has_no_settings_to_compare(tmp_path):
    run = RunFolder.open(tmp_path, options(setting("a", 1)), seed=7)
    run.append_metrics({"step": 1})
    RunFolder.open(tmp_path, RunOptions(resume="auto"), seed=7)


def test_a_stage_has_the_settings_that_its_function_reads():
    both, one = setting("a", 1, used_by=["first.train", "second.train"]), setting("b", 1, used_by=["second.train"])
    narrowed = options(both, one, resume="auto").of("first")
    assert narrowed == options(both, resume="auto")


@pytest.mark.parametrize("trial", [{"dry_run": True}, {"profile": 5}])
def test_trials_replace_each_other_and_nothing_else(tmp_path, trial):
    run = finished_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    first = start(tmp_path / "run/", **trial)
    assert first.root == tmp_path / f"run-{RunOptions(**trial).trial}"
    first.append_metrics({"step": 1})
    first.model.mkdir()
    second = start(tmp_path / "run", **trial)
    assert second.environment()["trial"] == second.options.trial
    assert not second.metrics_log.exists()
    assert not second.model.exists()
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


@pytest.mark.parametrize("holds", ["a run in earnest", "another trial", "foreign files"])
def test_a_trial_never_replaces_what_is_no_trial_of_its_kind(tmp_path, holds):
    place = tmp_path / "run-dry-run"
    if holds == "a run in earnest":
        finished_run(place)
    elif holds == "another trial":
        start(tmp_path / "run", profile=5)
        (tmp_path / "run-profile").rename(place)
    else:
        (place / "model").mkdir(parents=True)
    before = sorted(place.rglob("*"))
    with pytest.raises(
        InputError, match=r"--dry-run works in .*, which holds a run of another kind|holds model but no run wrote it"
    ):
        start(tmp_path / "run", dry_run=True)
    assert sorted(place.rglob("*")) == before


def test_a_trial_is_never_continued(tmp_path):
    start(tmp_path / "run", dry_run=True).append_metrics({"step": 1})
    with pytest.raises(InputError, match=r"run-dry-run holds what --dry-run left, which cannot be continued"):
        start(tmp_path / "run-dry-run", resume="auto")
    assert start(tmp_path / "run-dry-run", overwrite=True).environment()["trial"] is None


def test_a_new_run_leaves_the_files_of_others_alone(tmp_path):
    foreign = [tmp_path / ".tmpAb12Cd", tmp_path / ".theirs.tmp"]
    for path in foreign:
        path.write_text("theirs")
    start(tmp_path)
    assert all(path.exists() for path in foreign)


def test_what_a_killed_program_left_is_gone_after_the_next_start(tmp_path):
    run = start(tmp_path / "run")
    run.append_metrics({"step": 1})
    left = [".env.json.tmp", "ranks_test.safetensors.part", ".tmpAb12Cd", "report/.index.html.tmp"]
    for name in left:
        (run.root / name).write_text("half")
    for folder in (".model.tmp-abc", "more_models/.shop.tmp-abc", ".model.old-17"):
        (run.root / folder).mkdir(parents=True)
    (run.root / ".model.old-17/config.json").write_text("{}")
    start(tmp_path / "run", resume="auto")
    assert (run.model / "config.json").is_file()  # retired just before the kill, so nothing had taken its place
    names = {str(path.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()}
    assert not names & {*left}
    assert not [name for name in names if name.startswith(".") and name != ".lock"]
    assert not [path for path in run.root.rglob(".*") if path.is_dir()]
