"""Claim: logging, checkpoints and the bookkeeping of evaluation cost less than 3% of the time of training.

At the default intervals (log 50, evaluation and checkpoint 1000), on the tasks of `make demo`. Beside it, what each
feature of the loop costs by itself. Weights are compared bitwise first, wherever a feature must not change them.

    whole_loop           `run_training` for 1000 steps: the time outside its steps, against the time inside; on a GPU
                         every step is waited for, so that none of this hides behind the device
    ours                 a step by itself: OptimizerStep
    plain                the same step in a dozen lines, which neither looks for numbers that are not finite nor logs
    averaged_weights     ours, with a moving average of the weights
    parameter_groups     ours, with two groups of parameters
    checkpoint_waiting   what training waits for a checkpoint if it waits for the disk, shared out over 1000 steps
    checkpoint           what it waits as it is: for the copy in memory
    log                  a line of metrics.jsonl, shared out over 50 steps
    log_tensorboard      with TensorBoard's files as well
    log_wandb            with W&B offline as well

`cost` is the share of a step that a row adds, of the step that it is compared with: plain for ours, ours for the rest.
Contenders take turns. The claim is about whole_loop, and counts checkpoint_waiting on top of it.

    python -m benchmarks.training_costs
    python -m benchmarks.training_costs --quick     # few steps, intervals shortened alike
"""

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

import training.loop
from benchmarks.common import begin, finish, interleaved, parser, summarize, synchronize
from benchmarks.demo_tasks import decoder_task, rqvae_task
from benchmarks.rungs import OURS
from data.schemas import InputError
from training.averages import AveragedWeights
from training.checkpoint import CheckpointStore
from training.cli import run_cli
from training.loop_config import LoopConfig
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, optimizer_state
from training.parameter_groups import ParameterGroup
from training.processes import process_state
from training.run_folder import RunFolder, RunOptions
from training.step import OptimizerStep
from training.task import Batch, Task

CLAIM = 0.03
PLAIN, AVERAGES, GROUPS = "plain", "averaged_weights", "parameter_groups"

TASKS: dict[str, Callable[[], Task]] = {"decoder": decoder_task, "rqvae": rqvae_task}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        num_steps: of the whole loop, with one evaluation and one checkpoint.
        log_every: steps.
        verified: steps after which weights are compared.
        repeats: of single steps.
        writes: checkpoints and log lines.
    """

    num_steps: int = 1000
    log_every: int = 50
    verified: int = 20
    repeats: int = 150
    writes: int = 10


FULL = Sizes()
QUICK = Sizes(num_steps=20, log_every=5, verified=4, repeats=4, writes=3)


class Contender:
    """One way to train a task, a step at a time.

    Args:
        name: of the row.
        build: makes its task, the same every time.
    """

    def __init__(self, name: str, build: Callable[[], Task]) -> None:
        self.task = build()
        self._name = name
        self._number = 0
        device = process_state().device
        config = loop_config(FULL, parameter_groups=groups_of(self.task) if name == GROUPS else ())
        self.task.model.to(device).train()
        recorded = config.uses_cuda_graphs()
        self.optimizer = build_optimizer(self.task.model, config, recorded=recorded)
        self._step = OptimizerStep(
            self.task,
            self.task.model,
            self.optimizer,
            accelerator=Accelerator(cpu=device.type == "cpu", mixed_precision="no"),
            config=config,
            recorded=recorded,
            averages=AveragedWeights(self.task.model, 0.999) if name == AVERAGES else None,
        )

    def __call__(self) -> None:
        """One step, after which all contenders have drawn the same random numbers."""
        torch.manual_seed(self._number)
        self.step()

    def step(self) -> None:
        """One step with the random numbers that come."""
        if self._name == PLAIN:
            self._plain_step(self.task.batch(self._number))
        else:
            self._step([self.task.batch(self._number)])
        self._number += 1

    def weights(self) -> dict[str, Tensor]:
        """Everything that its model holds."""
        return dict(self.task.model.state_dict())

    def _plain_step(self, batch: Batch) -> None:
        loss = self.task.loss(self.task.model, batch.to(process_state().device))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def loop_config(sizes: Sizes, **changes: Any) -> LoopConfig:
    """The settings of all contenders; one step more, so that the one before it is evaluated and saved."""
    return LoopConfig(
        num_steps=sizes.num_steps + 1,
        learning_rate=1e-3,
        mixed_precision="no",
        log_every=sizes.log_every,
        eval_every=sizes.num_steps,
        checkpoint_every=sizes.num_steps,
        **changes,
    )


def groups_of(task: Task) -> tuple[ParameterGroup, ...]:
    """Two groups that train as one does: the first half of the parameters, by name, is named."""
    names = [name for name, parameter in task.model.named_parameters() if parameter.requires_grad]
    return (ParameterGroup(parameters=tuple(names[: len(names) // 2]), learning_rate_factor=1.0),)


def verify(case: str, contenders: Mapping[str, Contender], num_steps: int) -> None:
    """Stop unless all contenders' weights are bitwise equal after some steps.

    Raises:
        AssertionError: if they differ, so that nothing is reported.
    """
    for contender in contenders.values():
        for _ in range(num_steps):
            contender()
    expected = contenders[OURS].weights()
    for name, contender in contenders.items():
        require_equal(name, contender.weights(), expected)
    print(f"{case}: {', '.join(contenders)} give bitwise equal weights after {num_steps} steps")


def verify_loop(case: str, build: Callable[[], Task], sizes: Sizes, folder: Path) -> None:
    """Stop unless the whole loop ends with the weights of its steps alone.

    Raises:
        AssertionError: if they differ, so that nothing is reported.
    """
    alone = Contender(OURS, build)
    torch.manual_seed(0)
    for _ in range(sizes.verified):
        alone.step()
    task = build()
    train(task, replace(sizes, num_steps=sizes.verified), folder)
    require_equal("whole_loop", task.model.state_dict(), alone.weights())
    print(f"{case}: the whole loop gives the weights of its {sizes.verified} steps")


def require_equal(name: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """AssertionError where a tensor differs."""
    for key, value in expected.items():
        if not torch.equal(weights[key], value):
            raise AssertionError(f"{name}: {key} is not that of {OURS}; nothing is reported.")


def train(task: Task, sizes: Sizes, folder: Path) -> None:
    """A whole run; the task's model holds the weights of the last step but one, which was evaluated first."""
    run = RunFolder.open(folder, RunOptions(), seed=0)
    with redirect_stderr(io.StringIO()):
        training.loop.run_training(task, loop_config(sizes), run, seed=0)


def step_rows(case: str, contenders: Mapping[str, Contender], sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Rows of single steps, and what each adds to the step that it is compared with."""
    seconds = interleaved(contenders, repeats=sizes.repeats, warmup=1, device=device)
    rows = []
    for name, values in seconds.items():
        against = PLAIN if name == OURS else OURS
        row: dict[str, Any] = {"case": case, "implementation": name, **summarize(values)}
        if name != PLAIN and against in seconds:
            row |= {"against": against, "cost": paired_cost(values, seconds[against])}
        rows.append(row)
    return rows


def paired_cost(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of what one takes more than the other in the same round, as a share of the other's median."""
    more = statistics.median(value - other for value, other in zip(values, others, strict=True))
    return round(more / statistics.median(others), 4)


class TimedStep(OptimizerStep):
    """A step that notes when it began and ended; the loop makes one, out of sight."""

    times: ClassVar[list[tuple[float, float]]] = []

    def __call__(self, batches: Iterable[Batch]) -> Any:
        """A step."""
        started = time.perf_counter()
        result = super().__call__(batches)
        synchronize(process_state().device.type)
        self.times.append((started, time.perf_counter()))
        return result


def loop_row(case: str, build: Callable[[], Task], sizes: Sizes, folder: Path) -> dict[str, Any]:
    """A whole run: seconds between its steps, as a share of those within."""
    TimedStep.times.clear()
    with patch.object(training.loop, "OptimizerStep", TimedStep):
        train(build(), sizes, folder)
    times = TimedStep.times
    within = sum(end - start for start, end in times[:-1])
    between = times[-1][0] - times[0][0] - within
    return {
        "case": case,
        "implementation": "whole_loop",
        "median_ms": round(1000 * statistics.median(end - start for start, end in times), 4),
        "against": "its own steps",
        "ms_per_step": round(1000 * between / sizes.num_steps, 4),
        "cost": round(between / within, 4),
    }


def checkpoint_rows(
    case: str, contender: Contender, sizes: Sizes, folder: Path, step_ms: float
) -> list[dict[str, Any]]:
    """How long training waits for a checkpoint, with and without waiting for the disk."""
    folder.mkdir()
    store = CheckpointStore(folder, keep=2)
    copied, written = [], []
    for number in range(sizes.writes):
        state = {"model": contender.task.model.state_dict(), "optimizer": optimizer_state(contender.optimizer)}
        started = time.perf_counter()
        store.save(number, state, {"step": number})
        copied.append(time.perf_counter() - started)
        store.wait()
        written.append(time.perf_counter() - started)
    store.close()
    return [
        shared_out(case, "checkpoint_waiting", written, sizes.num_steps, step_ms),
        shared_out(case, "checkpoint", copied, sizes.num_steps, step_ms),
    ]


def log_rows(case: str, sizes: Sizes, folder: Path, step_ms: float) -> list[dict[str, Any]]:
    """How long a line of the log takes, with each tracker."""
    return [
        log_row(case, "log", sizes, folder / "alone", step_ms),
        log_row(case, "log_tensorboard", sizes, folder / "tensorboard", step_ms, tensorboard_logging=True),
        log_row(case, "log_wandb", sizes, folder / "wandb", step_ms, wandb_logging=True),
    ]


def log_row(case: str, name: str, sizes: Sizes, folder: Path, step_ms: float, **trackers: bool) -> dict[str, Any]:
    """A row of `log_rows`, with a note where the tracker is not installed."""
    run = RunFolder.open(folder, RunOptions(), seed=0)
    try:
        log = MetricsLog(run, {}, **{"wandb_logging": False, "tensorboard_logging": False, **trackers})
    except InputError as error:
        return {"case": case, "implementation": name, "note": f"n/a: {error}"}
    values = {f"train/{number}": float(number) for number in range(10)}
    seconds = []
    log.start(0, say=print)
    for step in range(1, 3 * sizes.writes):
        started = time.perf_counter()
        log.write(step, 0.0, values)
        seconds.append(time.perf_counter() - started)
    log.close()
    return shared_out(case, name, seconds, sizes.log_every, step_ms)


def shared_out(case: str, name: str, seconds: Sequence[float], num_steps: int, step_ms: float) -> dict[str, Any]:
    """A row of something that happens once in so many steps."""
    row: dict[str, Any] = {"case": case, "implementation": name, **summarize(seconds), "against": OURS}
    per_step = row["median_ms"] / num_steps
    return row | {"ms_per_step": round(per_step, 4), "cost": round(per_step / step_ms, 5)}


def run(case: str, build: Callable[[], Task], sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """All rows of a task."""
    names = [OURS, AVERAGES, GROUPS]
    if device == "cpu":
        names.append(PLAIN)  # recorded steps have no plain counterpart
    contenders = {name: Contender(name, build) for name in names}
    verify(case, contenders, sizes.verified)
    rows = step_rows(case, contenders, sizes, device)
    step_ms = next(row["median_ms"] for row in rows if row["implementation"] == OURS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # W&B may write on
        root = Path(folder)
        verify_loop(case, build, sizes, root / "verified")
        rows += checkpoint_rows(case, contenders[OURS], sizes, root / "checkpoints", step_ms)
        rows += log_rows(case, sizes, root, step_ms)
        del contenders
        rows.insert(0, loop_row(case, build, sizes, root / "run"))
    return rows


def verdict(case: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The claim about a task; all that the disk takes counts, as if it slowed training down by as much."""
    costs = {row["implementation"]: row.get("cost", 0.0) for row in rows if row["case"] == case}
    outside, disk = costs["whole_loop"], costs["checkpoint_waiting"]
    met = "met" if outside + disk < CLAIM else "MISSED"
    parts = f"{outside:.2%} outside the steps, the disk {disk:.2%} at most"
    return f"claim: less than {CLAIM:.0%} lost; {case}: {parts}, {met}"


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device = begin(arguments)
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    if device == "cpu":
        settings["ACCELERATE_USE_CPU"] = "true"  # else runs would take a GPU that is there
    sizes = QUICK if arguments.quick else FULL
    with patch.dict(os.environ, settings):
        rows = [row for case, build in TASKS.items() for row in run(case, build, sizes, device)]
    if not arguments.quick:
        for case in TASKS:
            print(verdict(case, rows))
    finish("training_costs", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
