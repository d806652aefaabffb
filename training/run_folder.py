"""The folder of a run: what was asked for, on what it ran, and what came out.

config.gin             as given, includes inlined
operative_config.gin   every parameter in use, with its origin
env.json               versions, commit, hardware, seed, data, backend, precision; marks the folder as a run
metrics.jsonl          one object per logged step
metrics.json           final metrics
ranks_*.safetensors    every user's rank, of runs that rank
checkpoints/           see checkpoint.py
model/                 the artifact
more_models/           artifacts of further data sets, of runs that train on several
report/                plots, and of tokenizers a page
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from data.files import disk_problem, replace_file
from data.schemas import InputError
from training.checkpoint import remove_checkpoints
from training.processes import on_main, process_state

_FORMAT = 1
_FILES = ("config.gin", "operative_config.gin", "env.json", "metrics.jsonl", "metrics.json")
_FOLDERS = ("checkpoints", "model", "more_models", "report")
_PACKAGES = ("torch", "triton", "accelerate", "gin-config", "numpy", "safetensors", "einops", "polars", "wandb")


@dataclass(frozen=True)
class RunOptions:
    """How a training run was started.

    Attributes:
        resume: None, "auto" (newest whole checkpoint of the run folder, or a fresh start), or a checkpoint's path.
        overwrite: replace the run that the folder holds.
        config_text: config as given.
        operative_config: every parameter in use.
        command: command line.
    """

    resume: str | None = None
    overwrite: bool = False
    config_text: str = ""
    operative_config: str = ""
    command: str = ""


class RunFolder:
    """Paths and records of one run. Under several processes only the main one writes."""

    def __init__(self, root: Path, options: RunOptions) -> None:
        self.root = root
        self.options = options
        self.checkpoints = root / "checkpoints"
        self.model = root / "model"
        self.more_models = root / "more_models"
        self.report = root / "report"
        self.metrics_log = root / "metrics.jsonl"

    @classmethod
    def open(
        cls, root: str | Path, options: RunOptions, *, seed: int, data_manifest_hash: str | None = None
    ) -> "RunFolder":
        """Create the folder of a new run, or reopen that of a run to be continued.

        Raises:
            InputError: if the folder holds a run that got anywhere and neither `resume` nor `overwrite` allows touching
                it, if it holds files of those names that no run wrote, if another program is running in it, if the run
                to continue used other data, if the folder cannot be written, or for an impossible seed.
        """
        if not 0 <= seed < 2**31:
            raise InputError(f"train.seed expected 0 to {2**31 - 1}, got {seed}.")
        if not str(root).strip():
            raise InputError("train.save_dir_root is empty. Name a folder for the run.")
        run = cls(Path(root), options)
        on_main(lambda: run._prepare(seed, data_manifest_hash))
        return run

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null."""
        if process_state().is_main_process:
            with self.metrics_log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_json_ready(record), allow_nan=False) + "\n")

    def environment(self) -> dict[str, Any]:
        """What env.json says: versions, commit, hardware, seed, data manifest hash, how the run computes."""
        return _read_environment(self.root / "env.json") or {}

    def require_same(self, **inputs: str) -> None:
        """Note what the weights depend on besides the data, such as a tokenizer's hash, in env.json.

        Raises:
            InputError: if this run goes on and had another such input before.
        """
        environment = self.environment()
        for name, value in inputs.items():
            before = environment["inputs"].setdefault(name, value)
            if before != value:
                raise InputError(
                    f"the run in {self.root} was trained with another {name} ({before[:12]}, now {value[:12]}). "
                    "Resume with the one it had, or start a new run elsewhere."
                )
        on_main(lambda: self._write_environment(environment))

    def note(self, **facts: Any) -> None:
        """Add how this run computes to env.json."""
        environment = {**self.environment(), **facts}
        on_main(lambda: self._write_environment(environment))

    def drop_metrics_after(self, step: int, *, evaluated_step: int) -> None:
        """Forget the steps and evaluations logged after these: a resumed run logs them again."""
        if process_state().is_main_process and self.metrics_log.is_file():
            kept = ""
            for line in self.metrics_log.read_text(encoding="utf-8").splitlines():
                last = step if '"train/' in line else evaluated_step
                if (logged := _step_of(line)) is not None and logged <= last:
                    kept += f"{line}\n"
            replace_file(self.metrics_log, kept)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the final metrics.json; numbers that are not finite become null."""
        text = json.dumps(_json_ready(metrics), indent=2, allow_nan=False) + "\n"
        on_main(lambda: replace_file(self.root / "metrics.json", text))

    def _prepare(self, seed: int, data_manifest_hash: str | None) -> None:
        try:
            replaces = self._claim(data_manifest_hash)
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            if replaces:
                self._remove_run()
            inputs = self.environment().get("inputs", {}) if self._continues() else {}
            environment = _environment(self.options.command, seed, data_manifest_hash) | {"inputs": inputs}
            self._write_environment(environment)
            if self.options.config_text:
                replace_file(self.root / "config.gin", self.options.config_text)
                replace_file(self.root / "operative_config.gin", self.options.operative_config)
            for folder in (self.checkpoints, self.report):
                folder.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"train.save_dir_root = {str(self.root)!r} cannot be a folder: {error.filename}: "
                f"{error.strerror}. Choose another path."
            ) from error
        except OSError as error:
            problem = disk_problem(error)
            if problem is None:
                raise
            raise InputError(
                f"cannot write the run folder {self.root}: {problem}. Set train.save_dir_root to a writable folder."
            ) from error

    def _write_environment(self, environment: Mapping[str, Any]) -> None:
        replace_file(self.root / "env.json", json.dumps(environment, indent=2) + "\n")

    def _lock(self) -> None:
        """Keep other programs out of the folder until this one ends, however it ends."""
        try:
            self._held = FileLock(self.root / ".lock", is_singleton=True).acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another program is training in {self.root}. Wait for it, stop it, or set train.save_dir_root to "
                "another folder."
            ) from None

    def _claim(self, data_manifest_hash: str | None) -> bool:
        """Whether what the folder holds is to be removed; InputError where this run may not have the folder."""
        present = [name for name in (*_FILES, *_FOLDERS) if (self.root / name).exists()]
        if not present:
            return False
        previous = _read_environment(self.root / "env.json")
        if previous is None:
            raise InputError(
                f"{self.root} holds {', '.join(present)} but no run wrote it (env.json is missing or foreign). "
                "Set train.save_dir_root to another folder."
            )
        if self._continues():
            self._check_same_data(previous, data_manifest_hash)
            return False
        if self._got_anywhere() and not self.options.overwrite:
            raise InputError(
                f"{self.root} already holds a run. Continue it with --resume auto, replace it with --overwrite, "
                "or set train.save_dir_root to another folder."
            )
        return True

    def _got_anywhere(self) -> bool:
        """Whether there is anything to lose; a run that was refused while it started leaves nothing behind."""
        results = [self.metrics_log, self.root / "metrics.json", self.model, *self.checkpoints.glob("step_*")]
        return any(path.exists() for path in results)

    def _continues(self) -> bool:
        """Whether this run goes on in its own folder, rather than starting from another run's checkpoint."""
        resume = self.options.resume
        return resume == "auto" or (resume is not None and Path(resume).resolve().is_relative_to(self.root.resolve()))

    def _check_same_data(self, previous: dict[str, Any], data_manifest_hash: str | None) -> None:
        before = previous.get("data_manifest_hash")
        if before is not None and data_manifest_hash is not None and before != data_manifest_hash:
            raise InputError(
                f"the run in {self.root} was trained on other data (manifest {before[:12]}, now "
                f"{data_manifest_hash[:12]}). Resume with the data it had, or start a new run elsewhere."
            )

    def _remove_run(self) -> None:
        """Remove what a run writes, but env.json, which marks the folder as a run's; anything else in it stays."""
        for path in (*(self.root / name for name in _FILES), *self.root.glob("ranks_*.safetensors")):
            if path.name != "env.json":
                path.unlink(missing_ok=True)
        for folder in (self.model, self.more_models):
            if folder.is_dir():
                shutil.rmtree(folder)
        for pattern in ("*.png", "*.html", "*.json"):
            for path in self.report.glob(pattern):
                path.unlink()
        remove_checkpoints(self.checkpoints)


def _read_environment(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("run_format") == _FORMAT else None


def _step_of(line: str) -> int | None:
    """Step of a line of metrics.jsonl; None for a line that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _json_ready(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _environment(command: str, seed: int, data_manifest_hash: str | None) -> dict[str, Any]:
    return {
        "run_format": _FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "data_manifest_hash": data_manifest_hash,
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "num_processes": process_state().num_processes,
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of this source tree, with "+changes" where tracked files differ from it; None without git."""
    source = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
