"""Signals, sent to a training script in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.script_tiny import train
from training.cli import main, run_cli
from training.interrupt import InterruptGuard

ROOT = "--gin.train.save_dir_root"
CONFIG = """
train.loop = @LoopConfig()
LoopConfig.learning_rate = 0.01
LoopConfig.num_steps = 40
LoopConfig.eval_every = 20
LoopConfig.log_every = 2
LoopConfig.checkpoint_every = 1000
"""


class Script:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.gin").write_text(CONFIG)

    def start(self, root, *arguments):
        command = [
            sys.executable, "-m", "tests.training.script_tiny", str(self.folder / "tiny.gin"),
            f"{ROOT}={self.folder / root}", *arguments,
        ]  # fmt: skip
        repository = Path(__file__).resolve().parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True, env=environment)

    def finish(self, root, *arguments):
        process = self.start(root, *arguments)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 0, error
        return error

    def stop_at(self, root, text, number, *arguments):
        """Start, send a signal when a line with the text appears, and wait."""
        process = self.start(root, *arguments)
        lines = []
        while not lines or text not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.send_signal(number)
        lines += process.stderr.readlines()
        return process.wait(timeout=60), "".join(lines)

    def newest(self, root):
        checkpoints = sorted((self.folder / root / "checkpoints").glob("step_*"))
        return checkpoints[-1] if checkpoints else None


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_resumes_exactly(script):
    assert main(train, "script_tiny", [str(script.folder / "tiny.gin"), f"{ROOT}={script.folder / 'whole'}"]) == 0
    code, error = script.stop_at("cut", "step 4/40", signal.SIGTERM, "--gin.train.step_seconds=0.05")
    assert code == 130
    assert "Traceback" not in error
    assert "continue with --resume auto" in error
    assert error.splitlines()[-1].startswith("interrupted: stopped at step ")
    stopped = json.loads((script.newest("cut") / "progress.json").read_text())["step"]
    assert 4 <= stopped < 20
    error = script.finish("cut", "--resume", "auto", "--allow-changes")
    assert "resumed from " in error
    states = [torch.load(script.newest(root) / "state.pt")["model"] for root in ("whole", "cut")]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.slow
def test_a_signal_leaves_a_long_evaluation_at_once_and_repeats_it_after_resuming(script):
    code, error = script.stop_at("cut", "evaluating", signal.SIGINT, "--gin.train.evaluation_seconds=300")
    assert code == 130
    assert "continue with --resume auto" in error
    assert script.newest("cut").name == "step_00000020"
    error = script.finish("cut", "--resume", "auto", "--allow-changes")
    assert error.count("evaluating") == 2
    records = [json.loads(line) for line in (script.folder / "cut/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "valid/error" in record] == [20, 40]


@pytest.mark.slow
def test_the_second_signal_leaves_at_once(script):
    process = script.start("cut", "--gin.train.step_seconds=300")
    while "batch 1" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"


SECOND = """
import signal, sys, threading, time
from pathlib import Path
from tests.training.tiny import LinearTask, train_tiny
from training import checkpoint, interrupt
from training.cli import run_cli

def write(*arguments, **keywords):
    writing.set()
    time.sleep(300)

class Stopping(LinearTask):
    def batch(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return super().batch(step)

def wait(store):
    writing.wait()
    signal.raise_signal(signal.SIGINT)

writing, interrupt._ECHO_SECONDS = threading.Event(), 0.0
checkpoint.write_checkpoint, checkpoint.CheckpointStore.wait = write, wait
sys.exit(run_cli(lambda argv: train_tiny(Path(sys.argv[1]), Stopping()), []))
"""


def test_the_second_signal_does_not_wait_for_a_checkpoint_that_is_being_written(tmp_path):
    command = [sys.executable, "-c", SECOND, str(tmp_path)]
    repository = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (130, "interrupted")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".writing_step_00000003"]


def test_the_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    """Under torchrun, Ctrl-C reaches a process twice: from the terminal and from the launcher."""
    with InterruptGuard() as guard:
        try:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pytest.fail("the echo counted")
        assert guard.requested
        later = time.monotonic() + 10
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_loop_sigterm_cleans_up_and_leaves_with_code_130(capsys):
    cleaned = []

    def command(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rather than the end of pytest, if the fault comes back
    try:
        assert run_cli(command, []) == 130
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned
    assert capsys.readouterr().err == "interrupted\n"
