import json
import os

import pytest
import torch

import ops.backend
from data.schemas import InputError
from tests.training import script_tiny
from training.cli import main, run_cli

CONFIG = """
train.loop = @LoopConfig()
LoopConfig.learning_rate = 0.01
LoopConfig.num_steps = 4
LoopConfig.log_every = 2
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.gin").write_text(CONFIG)

    def run(*arguments):
        code = main(script_tiny.train, "script_tiny", ["c.gin", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_a_run_from_start_to_end(run, tmp_path):
    code, _, _ = run("--gin.train.save_dir_root=out", "--gin.LoopConfig.num_steps=6")
    assert code == 0
    assert json.loads((tmp_path / "out/env.json").read_text())["command"] == (
        "python script_tiny.py c.gin --gin.train.save_dir_root=out --gin.LoopConfig.num_steps=6"
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 6]
    assert "LoopConfig.num_steps = 6  # command line\n" in (tmp_path / "out/operative_config.gin").read_text()
    assert main(script_tiny.train, "script_tiny", ["out/config.gin", "--gin.train.save_dir_root=again"]) == 0
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("out", "again")]
    assert json.loads(metrics[0])["valid/error"] == json.loads(metrics[1])["valid/error"]


def test_second_run_resume_and_overwrite(run, tmp_path):
    root = "--gin.train.save_dir_root=out"
    assert run(root)[0] == 0
    code, _, error = run(root)
    assert code == 2
    assert error == (
        "error: out already holds a run. Continue it with --resume auto, replace it with --overwrite, or set "
        "train.save_dir_root to another folder.\n"
    )
    code, _, error = run(root, "--resume", "auto", "--gin.LoopConfig.num_steps=8", "--allow-changes")
    assert code == 0
    assert "resumed from out/checkpoints/step_00000004" in error
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").glob("step_*")) == [
        "step_00000004",
        "step_00000008",
    ]
    assert run(root, "--overwrite")[0] == 0
    assert run(root, "--overwrite", "--resume", "auto")[0] == 2


def test_resume_auto_in_a_new_folder_starts_and_says_so(run):
    code, _, error = run("--gin.train.save_dir_root=out", "--resume", "auto")
    assert code == 0
    assert "--resume auto: no checkpoint in out/checkpoints, starting from the beginning" in error


def test_a_run_goes_on_with_other_settings_only_when_told(run, tmp_path, caplog):
    root = ["--gin.train.save_dir_root=out", "--resume", "auto"]
    assert run(*root)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    changed = ["--gin.LoopConfig.num_steps=8", "--gin.train.seed=4"]
    code, _, error = run(*root, *changed)
    assert code == 2
    assert error == (
        "error: the run in out was trained with other settings: script_tiny.train.seed: 3 -> 4 (command line); "
        "LoopConfig.num_steps: 4 -> 8 (command line). Set them back, go on with the new ones by --allow-changes, or "
        "start anew: with --overwrite of that run's own script, or in another train.save_dir_root.\n"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert run(*root, *changed, "--allow-changes")[0] == 0
    assert "the run in out goes on with other settings: script_tiny.train.seed: 3 -> 4 (comm" in caplog.messages[-1]
    changes = json.loads((tmp_path / "out/env.json").read_text())["changes"]
    assert [(change["name"], change["before"], change["now"]) for change in changes] == [
        ("script_tiny.train.seed", "3", "4"),
        ("LoopConfig.num_steps", "4", "8"),
    ]
    assert run(*root, *changed)[0] == 0
    assert json.loads((tmp_path / "out/env.json").read_text())["changes"] == changes


def test_a_dry_run_has_a_folder_of_its_own(run, tmp_path):
    root = "--gin.train.save_dir_root=out"
    for _ in range(2):
        assert run(root, "--dry-run")[0] == 0
    assert json.loads((tmp_path / "out-dry-run/env.json").read_text())["trial"] == "dry-run"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--profile", "3"], "--dry-run and --profile are two trials; give one of them."),
        (
            ["--dry-run", "--resume", "auto"],
            "--dry-run starts from the beginning, in a folder of its own; remove --res",
        ),
        (["--profile", "3", "--resume", "x"], "--profile starts from the beginning, in a folder of its own; remove --"),
        (["--profile", "0"], "--profile expected at least 1 step, got 0."),
    ],
)
def test_trials_that_contradict_themselves(run, tmp_path, arguments, message):
    code, _, error = run("--gin.train.save_dir_root=out", *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {message}")
    assert not list(tmp_path.glob("out*"))


def test_print_config_shows_values_with_origins_and_runs_nothing(run, tmp_path):
    code, output, _ = run("--gin.train.save_dir_root=out", "--print-config")
    assert code == 0
    assert "script_tiny.train.save_dir_root = 'out'  # command line\n" in output
    assert "LoopConfig.num_steps = 4  # c.gin:4\n" in output
    assert "LoopConfig.optimizer = 'adamw'  # default\n" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: config: train.save_dir_root (str) has no value."),
        (["--gin.train.save_dir_root"], "error: command line: expected --gin.NAME=VALUE, got --gin.train.save_dir_ro"),
        (["--gin.train.save_dir_root=o", "--gin.LoopConfig.num_stpes=3"], "error: command line: LoopConfig has no par"),
        (["--gin.train.save_dir_root=o", "--gin.LoopConfig.num_steps=0"], "error: LoopConfig.num_steps expected at le"),
        (["--gin.train.save_dir_root=o", "--resume", "nowhere"], "error: --resume nowhere: no such folder."),
    ],
)
def test_input_errors_are_one_line_and_code_2(run, arguments, message):
    code, _, error = run(*arguments)
    assert code == 2
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["nonsense", "triton"])
def test_an_impossible_backend_is_refused_before_any_work(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OPS_BACKEND", name)
    cached = (ops.backend._from_environment, ops.backend._decide)
    for function in cached:
        function.cache_clear()
    code, _, error = run("--gin.train.save_dir_root=out")
    for function in cached:
        function.cache_clear()
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert "OPS_BACKEND" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--resmue", "auto"], ["--resume"], ["--profile", "many"]])
def test_bad_usage_is_code_2(run, arguments):
    code, _, error = run(*arguments)
    assert code == 2
    assert "usage: script_tiny.py" in error


def test_help_is_code_0(run):
    assert run("--help")[0] == 0


def outcome(error, capsys):
    def command(argv):
        raise error

    code = run_cli(command, [])
    return code, capsys.readouterr().err


def test_exit_codes_of_any_command(capsys):
    assert run_cli(lambda argv: None, []) == 0
    assert run_cli(lambda argv: 3, []) == 3
    assert run_cli(lambda argv: len(argv), ["a", "b"]) == 2
    assert outcome(InputError("two\nlines"), capsys) == (2, "error: two lines\n")
    assert outcome(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    full = OSError(28, "No space left on device", "out/x")
    assert outcome(full, capsys) == (2, "error: out/x: the disk is full. Free space or choose another folder.\n")
    code, error = outcome(OSError(5, "Input/output error"), capsys)
    assert code == 1
    assert "Traceback" in error
    code, error = outcome(RuntimeError("a fault"), capsys)
    assert code == 1
    assert error.startswith("Traceback")
    assert error.endswith("RuntimeError: a fault\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_folder(run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, error = run("--gin.train.save_dir_root=locked/out")
    assert code == 2
    assert error.startswith("error: cannot write the run folder locked/out: permission denied.")
