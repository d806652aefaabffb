"""Where metrics go: always metrics.jsonl, and W&B through Accelerate when asked for."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from data.schemas import InputError
from training.run_folder import RunFolder

PROJECT = "generative-retrieval"


def tracker_names(wandb_logging: bool) -> list[str] | None:
    """Names of the trackers for `Accelerator(log_with=...)`.

    Raises:
        InputError: if W&B is asked for and not installed.
    """
    if wandb_logging and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "train.wandb_logging = True needs the package wandb. Install it (pip install wandb) or set False."
        )
    return ["wandb"] if wandb_logging else None


class MetricsLog:
    """Writes logged values of one run to all its trackers.

    Args:
        run: gets metrics.jsonl, and the files of W&B.
        accelerator: made with `tracker_names`.
        settings: what the trackers show as configuration.

    Raises:
        InputError: if W&B does not start.
    """

    def __init__(self, run: RunFolder, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self._run = run
        self._accelerator = accelerator
        if not accelerator.log_with:
            return
        wandb_options = {"dir": str(run.root), "name": run.root.resolve().name}
        try:
            accelerator.init_trackers(PROJECT, config=dict(settings), init_kwargs={"wandb": wandb_options})
        except Exception as error:  # wandb raises errors of its own, of many kinds
            raise InputError(
                f"W&B did not start ({error}). Run `wandb login`, set WANDB_MODE=offline, or "
                "set train.wandb_logging = False."
            ) from error

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Log values of a step; `seconds` is the training time so far."""
        self._run.append_metrics({"step": step, "seconds": round(seconds, 3), **values})
        if self._accelerator.log_with:
            self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Let the trackers finish their uploads."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
