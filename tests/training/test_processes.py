"""Two processes, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
train.loop = @LoopConfig()
LoopConfig.learning_rate = 0.01
LoopConfig.num_steps = 40
LoopConfig.eval_every = 20
LoopConfig.log_every = 2
LoopConfig.checkpoint_every = 20
"""


def torchrun(module, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "-m", module, *arguments],
        cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_one_process_writes_and_an_error_reaches_all():
    output, error = torchrun("tests.training.script_processes").communicate(timeout=120)
    assert sorted(output.splitlines()) == [
        "process 0 of 2: written, full disk",
        "process 1 of 2: full disk",
    ], error


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_and_the_resumed_run_ends_well(tmp_path):
    """The terminal signals the whole process group, and torchrun its workers once more."""
    (tmp_path / "tiny.gin").write_text(CONFIG)
    arguments = (
        "tests.training.script_tiny", str(tmp_path / "tiny.gin"), f"--gin.train.save_dir_root={tmp_path / 'run'}",
    )  # fmt: skip
    process = torchrun(*arguments, "--gin.train.step_seconds=0.2")
    while "step 4/40" not in (line := process.stderr.readline()):
        assert line, "torchrun ended early"
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert error.count("continue with --resume auto") == 1, error
    process = torchrun(*arguments, "--resume", "auto")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/loss" in record] == list(range(2, 41, 2))
    assert [record["step"] for record in records if "valid/error" in record] == [20, 40]
    assert json.loads((tmp_path / "run/env.json").read_text())["hardware"]["num_processes"] == 2
