"""The one training loop: it knows tasks, not models.

A step is one optimizer step: batches, loss, backward, clipping, update. Around the steps the loop logs, evaluates,
keeps the best weights, saves checkpoints and stops. One process resumed from a checkpoint on a CPU does bitwise what
it would have done without the interruption, dropout included.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, set_seed
from torch.nn.utils import get_total_norm

from data.files import disk_problem
from data.schemas import InputError
from ops import describe_backend
from training.averages import AveragedWeights
from training.bad_batches import refuse_to_go_on
from training.checkpoint import CheckpointStore
from training.interrupt import InterruptGuard, TrainingInterrupted
from training.loop_config import LoopConfig
from training.memory import estimate_memory
from training.metrics_log import MetricsLog
from training.optimizers import build_optimizer, set_rate_
from training.parts import TrainingParts
from training.processes import on_main, process_state
from training.profile import WARMUP_STEPS, StepProfile
from training.progress import Progress
from training.random_state import random_state, restore_random_state
from training.run_folder import RunFolder, RunOptions
from training.schedules import schedule_factor
from training.state import Clock, TrainingState
from training.step import OptimizerStep
from training.task import Task
from training.window import Window


@dataclass(frozen=True)
class TrainingResult:
    """How training ended.

    Attributes:
        best_metric, best_step: of the weights that the model now holds.
        steps: optimizer steps done.
        seconds: training time, earlier parts of a resumed run included.
        stopped_because: "num_steps", "patience" or "max_minutes".
    """

    best_metric: float
    best_step: int
    steps: int
    seconds: float
    stopped_because: str


def run_training(
    task: Task,
    config: LoopConfig,
    run: RunFolder,
    *,
    seed: int,
    resume: str | None = None,
    wandb_logging: bool = False,
    tensorboard_logging: bool = False,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a task; afterwards `task.model` holds the best weights, in evaluation mode.

    Args:
        task: what to train.
        config: how; a trial (see `RunOptions`) takes a few of its steps.
        run: gets checkpoints and metrics.
        seed: of dropout and other draws during training; the model is built by the caller.
        resume: None, "auto" or a checkpoint's path.
        wandb_logging: also log to W&B; not in a trial.
        tensorboard_logging: also log for TensorBoard; not in a trial.
        progress: True for a progress bar, False for lines, None for a bar on a terminal.

    Raises:
        InputError: for losses or gradients that stay not finite, an unusable checkpoint, a full disk.
        TrainingInterrupted: after Ctrl-C or SIGTERM; a checkpoint was saved.
        LeaveAtOnce: after a second one; a checkpoint may still be being written.
    """
    in_earnest = not run.options.is_trial
    log = MetricsLog(
        run,
        {**asdict(config), "seed": seed},
        wandb_logging=wandb_logging and in_earnest,
        tensorboard_logging=tensorboard_logging and in_earnest,
    )
    accelerator = _accelerator(config)
    set_seed(seed, device_specific=True)
    return _Trainer(task, config, run, log, accelerator).run(resume, progress)


def _accelerator(config: LoopConfig) -> Accelerator:
    """A fresh Accelerator; one process may train several models, each with its own precision."""
    device = process_state().device
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=config.precision_on(device))


def _for_trial(config: LoopConfig, options: RunOptions) -> LoopConfig:
    """A dry run takes two steps, a profile as many as it was asked for."""
    if not options.is_trial:
        return config
    return config.for_trial(2 if options.profile is None else WARMUP_STEPS + options.profile)


class _Trainer:
    """One training run; `run` and `_train` are the whole story."""

    def __init__(
        self, task: Task, asked: LoopConfig, run: RunFolder, log: MetricsLog, accelerator: Accelerator
    ) -> None:
        self._task = task
        self._asked = asked
        self._config = config = _for_trial(asked, run.options)
        self._run = run
        self._log = log
        self._accelerator = accelerator
        self._state = TrainingState()
        self._store = CheckpointStore(run.checkpoints, config.keep_checkpoints)
        self._guard = InterruptGuard()
        self._uses_graphs = config.uses_cuda_graphs(accelerator.num_processes)
        task.model.to(accelerator.device)
        optimizer = build_optimizer(task.model, config, recorded=self._uses_graphs)
        self._model = accelerator.prepare(task.model)
        averages = None if config.average_decay is None else AveragedWeights(task.model, config.average_decay)
        # Accelerate casts inside forward alone; the step casts all of the task's loss, and evaluation stays in fp32.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(task.model).pop(name, None)
        self._optimizer_step = OptimizerStep(
            task,
            self._model,
            optimizer,
            accelerator=accelerator,
            config=config,
            recorded=self._uses_graphs,
            averages=averages,
        )
        self._rate_factor = schedule_factor(
            config.schedule, warmup_steps=config.warmup_steps, num_steps=config.num_steps
        )
        window = Window(accelerator)
        self._parts = TrainingParts(task.model, optimizer, self._optimizer_step, averages, window, accelerator)
        self._saved = self._state.position
        self._learning_rate = config.learning_rate

    def run(self, resume: str | None, bar: bool | None) -> TrainingResult:
        """Train to the end and load the best weights."""
        is_main = self._accelerator.is_main_process
        self._progress = Progress(num_steps=self._config.num_steps, bar=bar, enabled=is_main)
        try:
            checkpoint = self._chosen(resume)
            self._announce()
            self._begin_after(checkpoint)
            self._clock = Clock(self._state)
            with self._guard, self._profiled() as self._profile:
                stopped_because = self._train()
            if self._profile is not None:
                self._progress.say(self._profile.report())
            on_main(self._store.wait)
            on_main(self._log.close)
            if (trial := self._run.options.trial) is not None:
                self._progress.say(
                    f"--{trial} has trained, evaluated and saved; the next one replaces {self._run.root}"
                )
        except OSError as error:
            self._explain(error)
            raise
        finally:
            self._progress.close()
            if not self._guard.insisted:  # else nothing is waited for
                self._close()
        self._store.load_best(self._task.model)
        self._task.model.eval()  # what rankers keep of a model, they make anew wherever it may train on
        state = self._state
        assert state.best_metric is not None
        return TrainingResult(state.best_metric, state.best_step, state.step, self._clock.seconds(), stopped_because)

    def _close(self) -> None:
        try:
            self._store.close()
        finally:  # may wait for uploads
            self._log.close()

    def _explain(self, error: OSError) -> None:
        """Raise what a person can mend as an InputError."""
        problem = disk_problem(error)
        if problem is not None:
            last = self._store.last()
            kept = f"The last whole checkpoint is {last}." if last else "There is no checkpoint yet."
            raise InputError(
                f"{error.filename or self._run.root}: {problem}. {kept} Free space or make the folder writable, then "
                "--resume auto."
            ) from error

    def _train(self) -> str:
        config, state = self._config, self._state
        self._model.train()
        self._parts.window.restart_clock()
        while True:
            finished, interrupted = self._finished(), self._agreed(self._guard.requested)
            due = state.evaluated_step < state.step and (state.step % config.eval_every == 0 or finished)
            if due and not interrupted:
                self._aside("evaluation", self._evaluate)
                finished, interrupted = finished or self._finished(), self._agreed(self._guard.requested)
            if state.position != self._saved and (state.step % config.checkpoint_every == 0 or finished or interrupted):
                self._aside("checkpoint", self._save)
            if interrupted:
                on_main(self._store.wait)
                self._progress.say(f"stopped at step {state.step}; continue with --resume auto")
                raise TrainingInterrupted(f"stopped at step {state.step}")
            if finished:
                return finished
            self._step()
            if state.step % config.log_every == 0 or state.step == config.num_steps:
                self._log_window()

    def _finished(self) -> str | None:
        """Why training ends here; None while it goes on."""
        config, state = self._config, self._state
        if config.patience is not None and state.evaluations_without_improvement >= config.patience:
            return "patience"
        if state.step >= config.num_steps:
            return "num_steps"
        limit = config.max_minutes
        return "max_minutes" if self._agreed(limit is not None and self._clock.seconds() >= 60 * limit) else None

    def _step(self) -> None:
        """One optimizer step; nothing in it waits for the device."""
        step, count = self._state.step, self._config.gradient_accumulation_steps
        self._set_rate(self._config.learning_rate * self._rate_factor(step))
        batches = (self._task.batch(number) for number in range(step * count, (step + 1) * count))
        self._parts.window.add(self._optimizer_step(batches))
        self._state.step += 1
        self._progress.advance()
        if self._profile is not None:
            self._profile.advance()

    def _set_rate(self, rate: float) -> None:
        if rate != self._learning_rate:
            set_rate_(self._parts.optimizer, rate)
            self._learning_rate = rate

    def _log_window(self) -> None:
        self._require_finite()
        on_main(self._store.raise_failure)
        config, state, window = self._config, self._state, self._parts.window
        values = window.read() | {"train/learning_rate": self._learning_rate}
        window.reset()
        self._log.write(state.step, self._clock.seconds(), values)
        self._progress.log(
            state.step,
            loss=values["train/loss"],
            learning_rate=self._learning_rate,
            examples_per_second=values["train/examples_per_second"],
            left=self._clock.seconds_left(state.step, num_steps=config.num_steps, max_minutes=config.max_minutes),
        )
        if values["train/skipped_steps"]:
            self._progress.say(
                f"warning: {values['train/skipped_steps']:.0f} of the steps since the last log were skipped, since "
                "their loss or gradient was not finite"
            )

    def _require_finite(self) -> None:
        """Stop where steps have been skipped for too long, or the weights themselves are no numbers any more."""
        skipped = self._optimizer_step.skipped_in_a_row()
        weights = [parameter.detach() for parameter in self._task.model.parameters()]
        weights_are_finite = bool(get_total_norm(weights).isfinite())
        if self._agreed_now(not weights_are_finite or skipped >= self._config.max_skipped_steps):
            refuse_to_go_on(
                self._task,
                self._run,
                last_step=self._state.step,
                num_skipped=skipped,
                weights_are_finite=weights_are_finite,
                batches_per_step=self._config.gradient_accumulation_steps,
                last_checkpoint=self._store.last(),
            )

    def _evaluate(self) -> None:
        """Evaluate without a trace in the training: random states are put back, a signal abandons it."""
        self._require_finite()
        device, model, metrics = self._accelerator.device, self._task.model, None
        before = random_state(device)
        model.eval()
        with self._averaged():
            with self._guard.abandonable() if self._accelerator.num_processes == 1 else nullcontext(), torch.no_grad():
                metrics = self._task.evaluate(model)
            if metrics is not None:
                shared = [metrics]
                broadcast_object_list(shared)
                self._record_evaluation(shared[0])
        model.train()
        restore_random_state(before, device)

    def _averaged(self) -> AbstractContextManager[None]:
        """The model holds the averages of its weights meanwhile, where there are any."""
        return nullcontext() if self._parts.averages is None else self._parts.averages.applied()

    def _record_evaluation(self, metrics: dict[str, float]) -> None:
        state, name = self._state, self._task.selection_metric
        self._log.write(state.step, self._clock.seconds(), metrics)
        value = metrics[name]
        if not math.isfinite(value):
            raise InputError(
                f"evaluation at step {state.step} gave {name} = {value}; the model cannot be selected by it."
            )
        improved = state.improves(value, higher_is_better=self._task.higher_is_better)
        if improved:
            on_main(lambda: self._store.save_best(self._task.model))
        state.take_evaluation(value, improved=improved)
        note = "best so far" if improved else f"best {state.best_metric:.4g} at step {state.best_step}"
        self._progress.say(f"step {state.step}: {name} {value:.4g} ({note})")

    def _save(self) -> None:
        """Copy what a checkpoint holds; it is written while training goes on."""
        self._require_finite()
        parts, progress = self._parts.state_dict(), {**asdict(self._state), "seconds": self._clock.seconds()}
        on_main(lambda: self._store.save(self._state.step, parts, progress))
        self._saved = self._state.position

    def _announce(self) -> None:
        """Say once, and note in env.json, how this run computes and what memory it asks for."""
        device = self._accelerator.device
        backend = describe_backend(device.type)
        graphs = "the training step as CUDA graphs" if self._uses_graphs else "without CUDA graphs"
        precision = self._accelerator.mixed_precision
        memory = estimate_memory(self._task, self._config, device)
        self._progress.say(f"{backend}, {graphs}, mixed precision {precision}")
        self._progress.say(memory.describe())
        self._run.note(
            ops=backend,
            cuda_graphs=self._uses_graphs,
            mixed_precision=precision,
            memory_estimate=memory.as_json(),
            selection_metric=self._task.selection_metric,
            higher_is_better=self._task.higher_is_better,
        )

    def _profiled(self) -> AbstractContextManager[StepProfile | None]:
        num_steps = self._run.options.profile
        if num_steps is None or not self._accelerator.is_main_process:
            return nullcontext()
        every = {"evaluation": self._asked.eval_every, "checkpoint": self._asked.checkpoint_every}
        return StepProfile(self._run.root / "profile", num_steps, self._accelerator.device, every=every)

    def _chosen(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from, agreed on by all processes."""
        chosen: list[Path | None] = [None]

        def choose() -> None:
            self._store.clean()
            overwrite = self._run.options.overwrite
            chosen[0] = self._store.choose(resume, discard_newer=overwrite, say=self._progress.say)
            self._store.adopt_best(chosen[0])

        on_main(choose)
        broadcast_object_list(chosen)
        return chosen[0]

    def _begin_after(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self._load(checkpoint)
        self._run.accept_changes()
        self._run.drop_metrics_after(self._state.step, evaluated_step=self._state.evaluated_step)
        self._log.start(self._state.step, say=self._progress.say)
        self._progress.start(self._state.step)

    def _load(self, checkpoint: Path) -> None:
        state, progress = self._store.read(checkpoint)
        try:
            self._parts.load_state_dict(state)
        except InputError as error:
            raise InputError(f"{checkpoint} {error}") from error
        self._state = TrainingState(**progress)
        if checkpoint.resolve().parent == self._run.checkpoints.resolve():  # else this run has yet to save it
            self._saved = self._state.position
        self._progress.say(f"resumed from {checkpoint}: step {self._state.step} of {self._config.num_steps}")

    def _aside(self, name: str, work: Callable[[], None]) -> None:
        """Do something whose time does not count as time of steps."""
        started = time.perf_counter()
        with nullcontext() if self._profile is None else self._profile.aside(name):
            work()
        self._parts.window.pause(time.perf_counter() - started)

    def _agreed(self, flag: bool) -> bool:
        """Whether any process raises the flag; several processes ask each other at log steps only."""
        if self._accelerator.num_processes == 1:
            return flag
        return self._state.step % self._config.log_every == 0 and self._agreed_now(flag)

    def _agreed_now(self, flag: bool) -> bool:
        if self._accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flags, reduction="sum") > 0)
