"""Trackers beside metrics.jsonl, through Accelerate: W&B and TensorBoard.

When a run goes on, a tracker is sent all lines of metrics.jsonl, and leaves out those that it has.
"""

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from data.schemas import InputError

PROJECT = "generative-retrieval"
_FINISH_SECONDS = "120"
"""How long the end of a run waits for uploads, unless WANDB_FINISH_TIMEOUT says otherwise; W&B's own is for ever."""


class Tracker:
    """A tracker of one run.

    Args:
        folder: for what the tracker writes, and for its note, which outlasts the process.
        settings: shown as configuration.

    Raises:
        InputError: if its package is not installed.
    """

    name: str
    _switch: str

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        if importlib.util.find_spec(self.name) is None:
            raise InputError(
                f"train.{self._switch} = True needs the package {self.name}. Install it (pip install {self.name}) or "
                "set False."
            )
        self._folder = folder
        self._settings = settings
        self._note_path = folder / f"{self.name}.json"

    def start(self, step: int) -> None:
        """Open it; training goes on after this step.

        Raises:
            InputError: if it does not start.
        """
        self._note = self._read_note()
        try:
            self._folder.mkdir(exist_ok=True)
            self._tracker = self._open(step)
        except Exception as error:  # of many kinds, most of them the packages' own
            raise self._start_error(error) from error

    def send(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the next line of metrics.jsonl unless that was done before; what is not finite leaves a gap."""
        self._log(step, {name: value for name, value in values.items() if value is not None and math.isfinite(value)})

    def finish(self) -> None:
        """Let it end its work."""
        self._tracker.finish()

    def _open(self, step: int) -> GeneralTracker:
        raise NotImplementedError

    def _log(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _start_error(self, error: Exception) -> InputError:
        raise NotImplementedError

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _write_note(self) -> None:
        """Whole or not at all, without waiting for the disk: it is written at every logged step."""
        temporary = self._note_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._note) + "\n", encoding="utf-8")
        os.replace(temporary, self._note_path)


class WandbRun(Tracker):
    """W&B, online or offline; a run that goes on keeps its id.

    W&B refuses steps that do not ascend and takes nothing back. So the step is a column, the x axis of every chart,
    and W&B's own step is the number of the line in metrics.jsonl, from which a server tells what it has. Offline
    nothing can be told, a killed process loses its last hundred lines or so, and of several folders with one id the
    one that is synchronised last replaces the others: each has all lines.
    """

    name = "wandb"
    _switch = "wandb_logging"

    def _open(self, step: int) -> GeneralTracker:
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)
        self._note.setdefault("id", uuid.uuid4().hex)
        self._write_note()
        name = self._folder.resolve().parent.name
        tracker = WandBTracker(PROJECT, dir=str(self._folder), name=name, id=self._note["id"], resume="allow")
        tracker.start()
        self._line, self._first = 0, tracker.tracker.step  # of those that are not on a server
        tracker.store_init_configuration(dict(self._settings))
        tracker.tracker.define_metric("step", hidden=True)
        tracker.tracker.define_metric("*", step_metric="step")
        return tracker

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._line >= self._first:
            self._tracker.log({"step": step, **values}, step=self._line)
        self._line += 1

    def _start_error(self, error: Exception) -> InputError:
        return InputError(
            f"W&B did not start ({error}). Run `wandb login`, set WANDB_MODE=offline, or set "
            "train.wandb_logging = False."
        )


class TensorBoardFiles(Tracker):
    """TensorBoard; what was logged beyond the step from which a run goes on is hidden from its curves.

    Every line is on disk when it was logged, and the note says how far they go.
    """

    name = "tensorboard"
    _switch = "tensorboard_logging"

    def _open(self, step: int) -> GeneralTracker:
        is_new = not self._note
        self._note |= {kind: min(self._note[kind], step) for kind in ("train", "evaluation") if kind in self._note}
        tracker = TensorBoardTracker(self.name, self._folder, purge_step=None if is_new else step + 1)
        tracker.start()
        if is_new:
            rows = "".join(f"| {name} | {value} |\n" for name, value in self._settings.items())
            tracker.log({"settings": f"| setting | value |\n|---|---|\n{rows}"}, step=0)
        return tracker

    def _log(self, step: int, values: dict[str, float]) -> None:
        kind = "train" if any(name.startswith("train/") for name in values) else "evaluation"
        if step > self._note.get(kind, -1):
            self._tracker.log(values, step=step)
            self._note[kind] = step
            self._write_note()

    def _start_error(self, error: Exception) -> InputError:
        return InputError(
            f"TensorBoard did not start ({error}). Make {self._folder} writable or set "
            "train.tensorboard_logging = False."
        )
