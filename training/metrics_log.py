"""Where metrics go: always to metrics.jsonl, and to trackers when asked for."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from training.processes import on_main
from training.run_folder import RunFolder
from training.trackers import TensorBoardFiles, Tracker, WandbRun


class MetricsLog:
    """Writes logged values of one run to metrics.jsonl and to its trackers, on the main process alone.

    Args:
        run: gets metrics.jsonl, and a folder for what the trackers write.
        settings: what the trackers show as configuration.
        wandb_logging: also log to W&B.
        tensorboard_logging: also log for TensorBoard.

    Raises:
        InputError: if a package is not installed that is needed.
    """

    def __init__(
        self, run: RunFolder, settings: Mapping[str, Any], *, wandb_logging: bool, tensorboard_logging: bool
    ) -> None:
        self._run = run
        asked = {WandbRun: wandb_logging, TensorBoardFiles: tensorboard_logging}
        self._asked: list[Tracker] = [
            kind(run.root / "trackers", settings) for kind, is_asked in asked.items() if is_asked
        ]
        self._trackers: list[Tracker] = []

    def start(self, step: int, *, say: Callable[[str], None]) -> None:
        """Start the trackers and send them the lines of metrics.jsonl, of which each leaves out those that it has.

        Args:
            step: training goes on after it; metrics.jsonl holds nothing beyond.
            say: told once of each tracker that fails later; training goes on without it.

        Raises:
            InputError: if a tracker does not start; on every process.
        """
        self._say = say
        on_main(lambda: self._start(step))

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Log values of a step; `seconds` is the training time so far."""
        self._run.append_metrics({"step": step, "seconds": round(seconds, 3), **values})
        self._send(step, values)

    def close(self) -> None:
        """Let the trackers finish their uploads."""
        for tracker in self._trackers:
            self._attempt(tracker, tracker.finish)
        self._trackers = []

    def _start(self, step: int) -> None:
        for tracker in self._asked:
            tracker.start(step)
            self._trackers.append(tracker)
        if self._trackers and self._run.metrics_log.is_file():
            for line in self._run.metrics_log.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._send(record.pop("step"), {name: value for name, value in record.items() if name != "seconds"})

    def _send(self, step: int, values: Mapping[str, float | None]) -> None:
        self._trackers = [tracker for tracker in self._trackers if self._attempt(tracker, tracker.send, step, values)]

    def _attempt(self, tracker: Tracker, work: Callable[..., None], *arguments: Any) -> bool:
        """Whether it went well; a tracker that fails must not end the training."""
        try:
            work(*arguments)
        except Exception as error:  # of many kinds, most of them the packages' own
            self._say(f"warning: {tracker.name} failed ({error}) and is no longer logged to; metrics.jsonl goes on")
            return False
        return True
