"""What a run folder says of its training; whatever is missing or damaged in it is left out and named."""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.schemas import InputError
from reports.plots import Curve, curves_of, number, read_records

_MARKS = ("env.json", "metrics.jsonl", "operative_config.gin")


@dataclass(frozen=True)
class Setting:
    """A parameter: its value as written in a config, and where it came from."""

    value: str
    origin: str


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: short, and its own among the runs that are looked at together.
        folder: of the run.
        environment: env.json.
        settings: operative_config.gin.
        progress: where the newest checkpoint stands.
        metrics: metrics.json, the final metrics; None where the run did not get there.
        records: metrics.jsonl.
        unreadable: files that are missing or damaged though every run has them.
    """

    name: str
    folder: Path
    environment: dict[str, Any]
    settings: dict[str, Setting]
    progress: dict[str, Any]
    metrics: dict[str, Any] | None
    records: list[dict[str, Any]]
    unreadable: tuple[str, ...]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Steps and values by name in the log."""
        return dict(curves_of(self.records))

    @property
    def trial(self) -> str | None:
        """Kind of a short run that was started to try things out, such as "dry-run"; None for one in earnest."""
        trial = self.environment.get("trial")
        return trial if isinstance(trial, str) else None

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Settings that were changed when the run went on."""
        changes = self.environment.get("changes")
        return [change for change in changes if isinstance(change, dict)] if isinstance(changes, list) else []

    def loop_setting(self, name: str) -> float | None:
        """A number of the LoopConfig that the run trained with; None where it is not set or not known."""
        loop = self._of_script("loop")
        setting = self.settings.get(f"{loop.strip('@()')}.{name}") if loop else None
        try:
            return number(ast.literal_eval(setting.value)) if setting else None
        except (ValueError, SyntaxError):
            return None

    def _of_script(self, parameter: str) -> str | None:
        """A parameter of the function that trained here; a config may hold those of two scripts."""
        scripts = [name.removesuffix(".save_dir_root") for name in self.settings if name.endswith(".save_dir_root")]
        here = [name for name in scripts if self._is_here(self.settings[f"{name}.save_dir_root"].value)]
        setting = self.settings.get(f"{(here or scripts or [''])[0]}.{parameter}")
        return None if setting is None else setting.value

    def _is_here(self, value: str) -> bool:
        return Path(value.strip("'\"")).name == self.folder.resolve().name


def on_same_data(runs: Sequence[Run]) -> bool:
    """Whether numbers of these runs may be compared."""
    return len({str(run.environment.get("data_manifest_hash")) for run in runs}) == 1


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of some folders.

    Raises:
        InputError: if one of them is no run folder.
    """
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not any((folder / mark).is_file() for mark in _MARKS):
        reason = "holds none of " + ", ".join(_MARKS) if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {reason}. Give the folder of a run: the save_dir_root of its training.")
    environment, settings = _read_json(folder / "env.json"), _read_settings(folder / "operative_config.gin")
    found = {"env.json": environment, "operative_config.gin": settings}
    progress = [
        content for path in sorted(folder.glob("checkpoints/step_*/progress.json")) if (content := _read_json(path))
    ]
    return Run(
        name=name,
        folder=folder,
        environment=environment or {},
        settings=settings,
        progress=progress[-1] if progress else {},
        metrics=_read_json(folder / "metrics.json"),
        records=_read_log(folder / "metrics.jsonl"),
        unreadable=tuple(file for file, content in found.items() if not content),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {folder.name}" for index, folder in enumerate(folders)]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_settings(path: Path) -> dict[str, Setting]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    settings = {}
    for line in lines:
        name, equals, rest = line.removeprefix("# ").partition(" = ")
        value, mark, origin = rest.rpartition("  # ")
        if equals and mark:
            settings[name] = Setting(value, origin)
    return settings


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        return read_records(path)
    except InputError:
        return []
