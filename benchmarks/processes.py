"""Claim: on a CPU, two processes with half the threads and half the batch each train the same weights, and what they
lose by telling each other their gradients shows in the ratio to one process with all threads.

    python -m benchmarks.processes --quick    # a minute
    python -m benchmarks.processes

The decoder and the RQ-VAE of `make demo` over random data, through the training loop with dropout off; times are per
step of the same global batch, one sample per logged window. Two processes on one CPU are no way to be faster: they are
what several machines or GPUs do, without those.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import REPOSITORY, begin, finish, parser, ratios, summarize
from benchmarks.demo_tasks import BATCH_SIZE, decoder_task, rqvae_task
from data.schemas import InputError
from training.cli import run_cli
from training.loop import run_training
from training.loop_config import LoopConfig
from training.processes import leave_together, on_main, process_state
from training.run_folder import RunFolder, RunOptions
from training.task import Task

TASKS: dict[str, Callable[[int], Task]] = {
    "decoder": lambda batch_size: decoder_task(batch_size=batch_size, dropout=0.0),
    "rqvae": lambda batch_size: rqvae_task(batch_size=batch_size),
}
NUM_PROCESSES = {"one_process": 1, "two_processes": 2}
VERIFIED_STEPS = 10
TOLERANCE = 1e-3
"""Of weights after VERIFIED_STEPS, in which AdamW moves them by 1e-2: gradients are summed in another order, and where
one is nearly 0 AdamW makes a whole step of a rounding error."""
WINDOW = 10
"""Steps per logged window."""


def train_share(name: str, folder: Path, num_steps: int) -> None:
    """What each process does: its share of the training; the main one writes weights and windows."""
    process = process_state()
    task = TASKS[name](BATCH_SIZE // process.num_processes)
    loop = LoopConfig(
        num_steps=num_steps,
        learning_rate=1e-3,
        mixed_precision="no",
        log_every=WINDOW,
        eval_every=num_steps,
        checkpoint_every=num_steps,
    )
    run = RunFolder.open(folder, RunOptions(), seed=0)
    run_training(task, loop, run, seed=0, progress=False)
    on_main(lambda: torch.save(task.model.state_dict(), folder / "weights.pt"))
    leave_together()


def train(name: str, folder: Path, *, num_processes: int, num_steps: int, threads: int) -> Path:
    """A training by so many processes, to its end.

    Returns:
        its folder.

    Raises:
        RuntimeError: if it fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", "benchmarks.processes"]
    command += ["--share-of", name, "--folder", str(folder), "--steps", str(num_steps)]
    environment = {"OMP_NUM_THREADS": str(max(threads // num_processes, 1)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{num_processes} processes did not train {name}:\n{done.stderr}")
    return folder


def verify(name: str, folders: Sequence[Path]) -> float:
    """The largest difference between weights of trainings in these folders.

    Raises:
        AssertionError: if they are not equal within TOLERANCE.
    """
    first, *others = (torch.load(folder / "weights.pt", weights_only=True) for folder in folders)
    for other in others:
        torch.testing.assert_close(other, first, rtol=TOLERANCE, atol=TOLERANCE)
    difference = max(float((other[key].float() - first[key].float()).abs().max()) for other in others for key in first)
    print(f"verified: {name}, the weights after {VERIFIED_STEPS} steps differ by at most {difference:.1e}")
    return difference


def window_seconds(folder: Path) -> list[float]:
    """Seconds per step of every window but the first, which also warms up."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = [record["train/examples_per_second"] for record in records if "train/loss" in record]
    return [BATCH_SIZE / speed for speed in speeds[1:]]


def measure(name: str, folder: Path, *, num_steps: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one and of two processes, trained in turn."""
    checked = {
        label: train(name, folder / f"{label} verified", num_processes=count, num_steps=VERIFIED_STEPS, threads=threads)
        for label, count in NUM_PROCESSES.items()
    }
    difference = verify(name, list(checked.values()))
    seconds: dict[str, list[float]] = {label: [] for label in NUM_PROCESSES}
    for repeat in range(repeats):
        for label, count in NUM_PROCESSES.items():
            place = folder / f"{label} {repeat}"
            train(name, place, num_processes=count, num_steps=num_steps, threads=threads)
            seconds[label] += window_seconds(place)
    rows: list[dict[str, Any]] = []
    for label, count in NUM_PROCESSES.items():
        row: dict[str, Any] = {"case": f"{name}, global batch {BATCH_SIZE}", "implementation": label}
        row |= {"threads_each": max(threads // count, 1), **summarize(seconds[label])}
        rows.append(row | {"examples_per_second": round(1000 * BATCH_SIZE / row["median_ms"])})
    rows[1] |= {"times_one_process": ratios(rows, of="one_process")["two_processes"], "difference": difference}
    return rows


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    made = parser(__doc__)
    for option in ("--share-of", "--folder", "--steps"):  # of the processes that this one starts
        made.add_argument(option, help=argparse.SUPPRESS)
    arguments = made.parse_args(argv)
    if arguments.share_of is not None:
        train_share(arguments.share_of, Path(arguments.folder), int(arguments.steps))
        return 0
    if arguments.device == "cuda":
        raise InputError("--device cuda: this benchmark is about processes on the CPU. Use --device cpu.")
    begin(arguments)
    num_steps, repeats = (3 * WINDOW, 1) if arguments.quick else (30 * WINDOW, 3)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in TASKS:
            place = Path(folder) / name
            rows += measure(name, place, num_steps=num_steps, repeats=repeats, threads=arguments.threads)
    finish("processes", rows, arguments, "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
