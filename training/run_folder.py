"""The folder of a run: what was asked for, on what it ran, and what came out.

config.gin             as given, includes inlined
operative_config.gin   every parameter in use, with its origin
env.json               versions, commit, hardware, seed, data, backend, precision; marks the folder as a run
metrics.jsonl          one object per logged step
metrics.json           final metrics
ranks_*.safetensors    every user's rank, of runs that rank
checkpoints/           see checkpoint.py
trackers/              files of W&B and TensorBoard, of runs that log there
model/                 the artifact
more_models/           artifacts of further data sets, of runs that train on several
report/                a page on the run or its tokenizer, and plots
profile/               of --profile: a trace of the steps, and where their time went

A trial, that is a dry run or a profile, has a folder of its own: SAVE_DIR_ROOT-dry-run or SAVE_DIR_ROOT-profile.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.files import clean_up, disk_problem, naming, replace_file
from data.schemas import InputError
from training.checkpoint import remove_checkpoints
from training.config_changes import Setting, SettingChange, changed_settings, read_settings, settings_text
from training.environment import describe_environment
from training.processes import on_main, process_state

_FORMAT = 1
_FILES = ("metrics.jsonl", "metrics.json", "config.gin", "operative_config.gin", "env.json")
_FOLDERS = ("checkpoints", "model", "more_models", "trackers", "report", "profile")
_LEFTOVERS = (".*.tmp", "ranks_*.part", ".tmp??????")
"""Of `replace_file`, of `save_ranks`, of safetensors."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a training run was started.

    Attributes:
        resume: None, "auto" (newest whole checkpoint of the run folder, or a fresh start), or a checkpoint's path.
        overwrite: replace the run that the folder holds.
        allow_changes: go on with other settings than the run had.
        dry_run: a trial of two steps, an evaluation and a checkpoint.
        profile: a trial that measures so many steps and an evaluation.
        config_text: config as given.
        settings: every parameter in use; none of a run that was started without gin.
        command: command line.

    Raises:
        InputError: for options that contradict each other.
    """

    resume: str | None = None
    overwrite: bool = False
    allow_changes: bool = False
    dry_run: bool = False
    profile: int | None = None
    config_text: str = ""
    settings: tuple[Setting, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        if self.dry_run and self.profile is not None:
            raise InputError("--dry-run and --profile are two trials; give one of them.")
        if self.profile is not None and self.profile < 1:
            raise InputError(f"--profile expected at least 1 step, got {self.profile}.")
        if self.is_trial and self.resume is not None:
            raise InputError(f"--{self.trial} starts from the beginning, in a folder of its own; remove --resume.")
        if self.resume not in (None, "auto") and not Path(self.resume).is_dir():
            raise InputError(f"--resume {self.resume}: no such folder. Name a checkpoint or a run folder, or say auto.")

    @property
    def trial(self) -> str | None:
        """Kind of trial, "dry-run" or "profile"; None for a run in earnest."""
        return "dry-run" if self.dry_run else None if self.profile is None else "profile"

    @property
    def is_trial(self) -> bool:
        """Whether this is a short run in a folder of its own, which never touches the run folder."""
        return self.trial is not None

    def of(self, script: str) -> "RunOptions":
        """The options for one stage of several, such as "train_rqvae": only the settings that its function reads."""
        used = tuple(setting for setting in self.settings if f"{script}.train" in setting.used_by)
        return replace(self, settings=used)


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
        self._changes: list[SettingChange] = []  # known to the main process

    @classmethod
    def open(
        cls, root: str | Path, options: RunOptions, *, seed: int, data_manifest_hash: str | None = None
    ) -> "RunFolder":
        """Create the folder of a new run, or reopen that of a run to be continued.

        A trial gets the folder of its kind beside `root`, and replaces the one that is there.

        Raises:
            InputError: if the folder holds a run that got anywhere and neither `resume` nor `overwrite` allows touching
                it, if it holds files of those names that no run wrote, or for a trial a run in earnest, if another
                program is running in it, if the run to continue used other data, or other settings without
                `allow_changes`, if the folder cannot be written, or for an impossible seed.
        """
        if not 0 <= seed < 2**31:
            raise InputError(f"train.seed expected 0 to {2**31 - 1}, got {seed}.")
        if not str(root).strip():
            raise InputError("train.save_dir_root is empty. Name a folder for the run.")
        run = cls(Path(f"{Path(root)}-{options.trial}" if options.is_trial else root), options)
        on_main(lambda: run._prepare(seed, data_manifest_hash))
        return run

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; numbers that are not finite become null."""
        if process_state().is_main_process:
            with naming(self.metrics_log), self.metrics_log.open("a", encoding="utf-8") as file:
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

    def accept_changes(self) -> None:
        """Note other settings with which this run goes on, once it is sure that it can."""
        on_main(self._record_changes)

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
            goes_on = self._continues() and self._got_anywhere()
            replaces = self._claim(goes_on, data_manifest_hash)
            self._changes = self._allowed_changes() if goes_on else []
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._clean_up()
            if replaces:
                self._remove_run()
            before = self.environment() if goes_on else {}
            self._write_environment(self._new_environment(seed, data_manifest_hash, before))
            if not self._changes:
                self._write_settings()
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

    def _new_environment(self, seed: int, data_manifest_hash: str | None, before: Mapping[str, Any]) -> dict[str, Any]:
        """What env.json says from now on; of a run that goes on it keeps the inputs and the changed settings."""
        return {
            "run_format": _FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.options.command,
            "trial": self.options.trial,
            "seed": seed,
            "data_manifest_hash": data_manifest_hash,
            **describe_environment(),
            "inputs": before.get("inputs", {}),
            "changes": before.get("changes", []),
        }

    def _record_changes(self) -> None:
        if not self._changes:
            return
        environment = self.environment()
        started = environment["started"]
        environment["changes"] += [{"started": started, **asdict(change)} for change in self._changes]
        self._write_environment(environment)
        self._write_settings()
        self._changes = []

    def _write_settings(self) -> None:
        if self.options.config_text:
            replace_file(self.root / "config.gin", self.options.config_text)
            replace_file(self.root / "operative_config.gin", settings_text(self.options.settings))

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

    def _clean_up(self) -> None:
        """Remove what a killed run left while it wrote; an artifact that was about to be replaced comes back."""
        if _read_environment(self.root / "env.json") is None:
            return  # what may be a folder for other things, too, where others use such names
        names = {path.name[1:].rsplit(".", 1)[0] for path in self.more_models.glob(".*.*-*")}
        for folder in (self.model, *(self.more_models / name for name in names)):
            clean_up(folder)
        for pattern in _LEFTOVERS:
            for path in (*self.root.glob(pattern), *self.report.glob(pattern)):
                path.unlink()

    def _claim(self, goes_on: bool, data_manifest_hash: str | None) -> bool:
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
        self._check_kind(previous)
        if goes_on:
            self._check_same_data(previous, data_manifest_hash)
            return False
        if self._got_anywhere() and not (self.options.overwrite or self.options.is_trial):
            raise InputError(
                f"{self.root} already holds a run. Continue it with --resume auto, replace it with --overwrite, "
                "or set train.save_dir_root to another folder."
            )
        return True

    def _check_kind(self, previous: dict[str, Any]) -> None:
        """A trial replaces trials of its kind alone, and nothing goes on with a trial."""
        there, here = previous.get("trial"), self.options.trial
        if here is not None and there != here:
            raise InputError(
                f"--{here} works in {self.root}, which holds a run of another kind. Move that, or set "
                "train.save_dir_root to another folder."
            )
        if there is not None and self._continues():
            raise InputError(
                f"{self.root} holds what --{there} left, which cannot be continued. Replace it with --overwrite, or "
                "set train.save_dir_root to another folder."
            )

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

    def _allowed_changes(self) -> list[SettingChange]:
        """How the settings differ from those with which the run came so far; InputError unless that is allowed."""
        record = self.root / "operative_config.gin"
        if not (self.options.settings and record.is_file()):
            return []
        before = read_settings(record.read_text(encoding="utf-8", errors="replace"))
        changes = changed_settings(before, self.options.settings)
        if not changes:
            return []
        listed = "; ".join(map(str, changes))
        if not self.options.allow_changes:
            raise InputError(
                f"the run in {self.root} was trained with other settings: {listed}. Set them back, go on with the new "
                "ones by --allow-changes, or start anew: with --overwrite of that run's own script, or in another "
                "train.save_dir_root."
            )
        _log.warning("the run in %s goes on with other settings: %s", self.root, listed)
        return changes

    def _remove_run(self) -> None:
        """Remove what a run writes, but env.json, which marks the folder as a run's; anything else in it stays.

        Checkpoints go first and settings last: killed in between, nothing is left that could go on with others.
        """
        remove_checkpoints(self.checkpoints)
        for folder in (self.model, self.more_models, self.root / "trackers", self.root / "profile"):
            if folder.is_dir():
                shutil.rmtree(folder)
        for pattern in ("*.png", "*.html", "*.json"):
            for path in self.report.glob(pattern):
                path.unlink()
        for path in (*(self.root / name for name in _FILES), *self.root.glob("ranks_*.safetensors")):
            if path.name != "env.json":
                path.unlink(missing_ok=True)


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
