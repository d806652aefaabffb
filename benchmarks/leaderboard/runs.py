"""Runs training scripts one after another, each in a process of its own, and goes on where it was stopped."""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common import REPOSITORY
from benchmarks.leaderboard.models import MODELS, TOKENIZER, Config, Model, budget_setting, quick_settings
from data.files import replace_file
from data.schemas import InputError

_WRITTEN_LAST = ("metrics.json", "ranks_valid.safetensors", "ranks_test.safetensors", "model/manifest.json")
_PLACES = ("save_dir_root", "raw_dir", "DatasetConfig.root")
"""Settings that say where things lie."""

_STOP_SECONDS = 300.0
"""A training that is told to stop ends its step and writes a checkpoint."""

_PR_SET_PDEATHSIG = 1

Command = Callable[[Sequence[str], Path, Mapping[str, str]], int]


@dataclass(frozen=True)
class BoardSettings:
    """What all runs of a board share.

    Attributes:
        dataset: name on the command line.
        split: of the data set.
        seeds: at least one.
        threads: of PyTorch on the CPU, per run.
        minutes: that training may take; None leaves that to the configs.
        raw_dir: raw files of the data set; None where the config says, or the network.
        root: of prepared data and features; None where the config says.
        text_model: local copy of the text encoder; None takes the one that the config names.
        quick: tiny step counts.
        device: "cpu" hides GPUs from the runs.
    """

    dataset: str
    split: str = "leave_one_out"
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    minutes: float | None = None
    raw_dir: Path | None = None
    root: Path | None = None
    text_model: Path | None = None
    quick: bool = False
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
        name: of the model.
        seed: of weights, batches and draws.
        folder: the script's run folder; its log and what the leaderboard notes lie beside it.
        config: as written.
        settings: what is set otherwise, by gin's names.
    """

    name: str
    seed: int
    folder: Path
    config: Config
    settings: Mapping[str, Any]

    @property
    def model(self) -> Model:
        """How it comes about."""
        return MODELS[self.name]

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record_file(self) -> Path:
        """What the leaderboard notes about it."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def identity(self) -> str:
        """Differs for runs that would not give the same model."""
        settings = {**self.config.values, **{name: str(value) for name, value in self.settings.items()}}
        decisive = {name: value for name, value in settings.items() if not name.endswith(_PLACES)}
        content = json.dumps([self.model.script, decisive], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def arguments(self) -> list[str]:
        """Of the Python that runs it."""
        overrides = [f"--gin.{name}={value}" for name, value in self.settings.items()]
        return [f"{self.model.script}.py", _relative(self.config.path), "--resume", "auto", *overrides]

    def record(self) -> dict[str, Any]:
        """What was noted; nothing of a run that has not begun."""
        try:
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def note(self, **facts: Any) -> None:
        """Add to what was noted."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.record_file, json.dumps({**self.record(), **facts}, indent=2) + "\n")

    @property
    def finished(self) -> bool:
        """Whether it has an artifact, metrics and every user's ranks."""
        return all((self.folder / name).is_file() for name in _WRITTEN_LAST)


@dataclass(frozen=True)
class Failure:
    """A run that did not get to its end, and the last line that says why."""

    run: Run
    error: str


def plan_runs(configs: Mapping[str, Path], settings: BoardSettings, folder: Path) -> list[Run]:
    """The runs of a board, all models with the first seed first.

    Args:
        configs: of each model.
        settings: of the board.
        folder: for all run folders.

    Raises:
        InputError: if a run has already finished there that would come out differently now, or one whose time is
            limited was begun with another number of threads.
    """
    read = {name: Config.read(path, MODELS[name].script) for name, path in configs.items()}
    runs = [
        _plan(name, config, seed, settings, folder)
        for seed in settings.seeds
        for name, config in read.items()
        if MODELS[name].seeded or seed == settings.seeds[0]
    ]
    for run in runs:
        record = run.record()
        if run.finished and record.get("identity") != run.identity:
            raise InputError(
                f"{run.folder} holds a finished run of another config, budget or split. Remove it, or give --output "
                "another folder."
            )
        threads = record.get("threads", settings.threads)
        if budget_minutes(run.config, settings) is not None and threads != settings.threads:
            raise InputError(
                f"{run.folder} was trained with {threads} threads, where minutes are worth something else than with "
                f"{settings.threads}. Give --threads {threads}, remove it, or give --output another folder."
            )
    return runs


def budget_minutes(config: Config, settings: BoardSettings) -> float | None:
    """Training time that a run may take; None is unlimited, or of what is not trained."""
    if config.loop is None:
        return None
    return config.max_minutes if settings.minutes is None else settings.minutes


def _plan(name: str, config: Config, seed: int, settings: BoardSettings, folder: Path) -> Run:
    model = MODELS[name]
    run_folder = folder / name / f"seed_{seed}"
    gin: dict[str, Any] = {
        f"{model.script}.train.save_dir_root": run_folder,
        f"{model.script}.train.seed": seed,
        "DatasetConfig.split": settings.split,
    }
    given = {"raw_dir": settings.raw_dir, "root": settings.root}
    gin |= {f"DatasetConfig.{key}": value for key, value in given.items() if value is not None}
    if config.tokenizer is not None:
        gin[f"{TOKENIZER}.train.save_dir_root"] = tokenizer_folder(config.tokenizer, folder)
    if model.reads_features and settings.text_model is not None:
        gin["FeatureConfig.model"] = settings.text_model
    gin |= quick_settings(config, model) if settings.quick else {}
    return Run(name, seed, run_folder, config, gin | budget_setting(config, settings.minutes))


def tokenizer_folder(named: str, folder: Path) -> Path:
    """Run folder of a tokenizer in place of the one that configs name; shared by models and seeds."""
    return folder / "tokenizers" / "-".join(Path(named).parts[-2:])


def run_all(runs: Iterable[Run], settings: BoardSettings, *, command: Command | None = None) -> list[Failure]:
    """Train what is not finished yet; a run that fails does not keep the others from going on.

    Args:
        runs: in the order in which they are to run.
        settings: of the board.
        command: runs Python with these arguments, a log file and more environment; None starts a process.

    Returns:
        The runs that failed.
    """
    failures = []
    runs = list(runs)
    for number, run in enumerate(runs, start=1):
        title = f"[{number}/{len(runs)}] {run.name}, seed {run.seed}"
        if run.finished:
            print(f"{title}: finished before", flush=True)
            continue
        print(f"{title}: {run.log}", flush=True)
        error = _run(run, settings, command or run_python)
        if error is not None:
            print(f"{title}: failed: {error}", flush=True)
            failures.append(Failure(run, error))
    return failures


def _run(run: Run, settings: BoardSettings, command: Command) -> str | None:
    """Start or continue one run; returns why it failed."""
    before = run.record().get("wall_seconds", 0.0)
    run.note(identity=run.identity, threads=settings.threads, budget_minutes=settings.minutes)
    environment = {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    printed = run.log.stat().st_size if run.log.is_file() else 0
    start = perf_counter()
    try:
        code = command(run.arguments(), run.log, environment)
    finally:
        run.note(wall_seconds=round(before + perf_counter() - start, 1))
    if code == 0 and run.finished:
        run.note(evaluation_seconds=_evaluation_seconds(run.folder))
        return None
    if code == 0:
        return f"{run.model.script}.py ended without all of {', '.join(_WRITTEN_LAST)}"
    return f"{_last_error(run.log, printed)} (exit code {code})"


def _evaluation_seconds(folder: Path) -> float:
    """From the artifact, which is written when training has ended, to the metrics, which are written last."""
    begin, end = ((folder / name).stat().st_mtime for name in ("model/manifest.json", "metrics.json"))
    return round(end - begin, 1)


def _last_error(log: Path, begin: int) -> str:
    """The last line with an error, or the last line, of what was printed from byte `begin` on."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1]


def run_python(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run Python in the repository and wait; returns its exit code. When this program is stopped, so is that one."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _end_with_parent() -> None:
    """Ask Linux to stop this process when the one that started it dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else str(path)
