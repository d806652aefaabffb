"""Two processes, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import training.processes
from data.schemas import InputError
from tests.tiny_dataset import NUM_ITEMS, write_interactions
from tests.training import script_equal
from training.processes import check_launch, leave_after_error, lost_process, timeout_seconds

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
train.loop = @LoopConfig()
LoopConfig.learning_rate = 0.01
LoopConfig.num_steps = 40
LoopConfig.eval_every = 8
LoopConfig.log_every = 2
LoopConfig.checkpoint_every = 4
train.step_seconds = 0.1
"""


def torchrun(module, *arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "-m", module, *arguments],
        cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def read_until(process, text):
    """The line of stderr that holds a text."""
    while text not in (line := process.stderr.readline()):
        assert line, "torchrun ended early"
    return line


@pytest.mark.slow
def test_processes_wait_for_each_other_and_say_whom_they_have_lost():
    output, error = torchrun("tests.training.script_processes", PROCESS_TIMEOUT_SECONDS="2").communicate(timeout=120)
    said = {rank: [line[3:] for line in output.splitlines() if line.startswith(f"{rank}: ")] for rank in (0, 1)}
    assert said[0][:3] == ["written", "InputError full disk -> None", "KeyError 'a fault' -> None"], error
    assert "process 0 of 2 cannot go on: nothing is heard of process 1, which has ended or stands" in said[0][3]
    assert said[1][0] == "InputError full disk -> None", error
    assert "process 0, which it waited for, has failed: KeyError: 'a fault'" in said[1][1]
    assert "process 1 of 2 cannot go on: nothing was heard of process 0, which it waited for, in 2 s" in said[1][2]
    assert len(said[0]) == 4
    assert len(said[1]) == 3
    assert all("--resume auto" in line for line in (said[0][3], *said[1][1:]))


@pytest.mark.slow
def test_two_processes_at_half_the_batch_equal_one(tmp_path):
    folders = tmp_path / "two", tmp_path / "one"
    for folder in folders:
        folder.mkdir()
        write_interactions(folder / "interactions.csv")
        np.save(folder / "features.npy", np.ones((NUM_ITEMS, 2), dtype=np.float32))
        keys = sorted({line.split(",")[1] for line in (folder / "interactions.csv").read_text().splitlines()[1:]})
        (folder / "features.keys.txt").write_text("\n".join(keys))
    process = torchrun("tests.training.script_equal", str(folders[0]))
    script_equal.train_all(folders[1])
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    for name in ("retrieval", "sequence", "accumulated", *script_equal.TOKENIZERS[1:]):
        two, one = (torch.load(folder / name / "weights.pt") for folder in folders)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    logs = [(folder / "ema" / "metrics.jsonl").read_text().splitlines() for folder in folders]
    skipped = [[json.loads(line).get("train/skipped_steps") for line in log] for log in logs]
    assert skipped[0] == skipped[1]
    assert skipped[0][0] > 0
    for name in ("ema", "restarts"):
        codes = torch.load(folders[0] / name / "weights.pt")["quantizers.0.weight"]
        assert codes.abs().max() < script_equal.FAR / 2, f"{name}: not restarted"


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_ctrl_c_saves_it(tmp_path):
    """The terminal signals the whole process group, and torchrun its workers once more."""
    (tmp_path / "tiny.gin").write_text(CONFIG)
    arguments = (
        "tests.training.script_tiny", str(tmp_path / "tiny.gin"), f"--gin.train.save_dir_root={tmp_path / 'run'}",
    )  # fmt: skip
    process = torchrun(*arguments)
    read_until(process, "step 6/40")
    next(child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1").kill()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1, error
    assert "error: process 0 of 2 cannot go on: nothing is heard of process 1" in error

    process = torchrun(*arguments, "--resume", "auto")
    assert "step_00000004" in read_until(process, "resumed from")
    read_until(process, "step 10/40")
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert error.count("continue with --resume auto") == 1, error
    checkpoints = tmp_path / "run/checkpoints"
    stopped = max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))
    assert 10 <= stopped < 40
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss" in record] == list(range(2, stopped + 1, 2))
    assert [record["step"] for record in records if "valid/error" in record] == list(range(8, stopped + 1, 8))
    assert json.loads((tmp_path / "run/env.json").read_text())["hardware"]["num_processes"] == 2
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharded_models_are_refused(variable):
    with pytest.raises(InputError, match=r"was asked for \(ACCELERATE_USE_.*train with DDP.*--config_file"):
        check_launch({f"ACCELERATE_USE_{variable}": "true"})


def test_a_launcher_that_starts_one_process_instead_of_several_is_refused():
    launched = {"ACCELERATE_USE_CPU": "True"}
    check_launch(launched)
    check_launch(launched | {"MASTER_PORT": "29500", "RANK": "0"})
    with pytest.raises(InputError, match="torchrun --nproc_per_node"):
        check_launch(launched | {"MASTER_PORT": "29500"})


def test_the_limit_of_collectives_comes_from_the_environment():
    assert timeout_seconds({}) == 600
    assert timeout_seconds({"PROCESS_TIMEOUT_SECONDS": "90"}) == 90
    for text in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(InputError, match=f"PROCESS_TIMEOUT_SECONDS expected a positive number, got '{text}'"):
            timeout_seconds({"PROCESS_TIMEOUT_SECONDS": text})


def test_in_a_run_of_one_process_nobody_is_lost():
    assert lost_process(RuntimeError("gloo: Connection closed by peer")) is None
    assert leave_after_error(3) == 3


def test_only_what_torch_says_of_a_broken_connection_is_about_another_process(monkeypatch):
    monkeypatch.setattr(training.processes, "_heartbeat", SimpleNamespace(silent=lambda: [1]))
    assert "nothing is heard of process 1" in lost_process(RuntimeError("gloo: Connection closed by peer"))

    class DownloadError(Exception):
        """As a package may have one that loads files from the network."""

    assert lost_process(DownloadError("Connection reset by peer")) is None
    assert lost_process(RuntimeError("shapes differ")) is None
