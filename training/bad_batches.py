"""The end of a training whose losses stay not finite: which items its batch held, and what is still good."""

import json
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from accelerate.utils import gather_object

from data.files import replace_file
from data.schemas import InputError
from training.processes import on_main
from training.run_folder import RunFolder
from training.task import Task

_SHOWN_ITEMS = 5


def refuse_to_go_on(
    task: Task,
    run: RunFolder,
    *,
    last_step: int,
    num_skipped: int,
    weights_are_finite: bool,
    batches_per_step: int,
    last_checkpoint: Path | None,
) -> NoReturn:
    """Name the step, its items and the last good checkpoint; report/bad_batch.json gets all of the items.

    Args:
        task: knows the items of its batches.
        run: gets the file.
        last_step: number of the step, from 1, that was done or skipped last.
        num_skipped: steps that were skipped in a row up to there.
        weights_are_finite: whether they are what skipping has kept them.
        batches_per_step: of every process.
        last_checkpoint: on the disk.

    Raises:
        InputError: always, on all processes.
    """
    step = last_step - max(num_skipped - 1, 0)
    batches = range((step - 1) * batches_per_step, step * batches_per_step)
    mine = [key for batch in batches for key in task.item_keys(batch)]
    items = list(dict.fromkeys(gather_object(mine)))
    path = run.report / "bad_batch.json"
    on_main(lambda: _write(path, {"step": step, "items": items}))
    everything = f" (all of them in {path})" if path.is_file() else ""
    shown = ", ".join(items[:_SHOWN_ITEMS]) + (f" and {len(items) - _SHOWN_ITEMS:,} more" * (len(items) > _SHOWN_ITEMS))
    kept = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    happened = _what_happened(step, last_step, num_skipped, weights_are_finite)
    raise InputError(
        f"{happened}; {kept}. The batch of step {step} held the items {shown}{everything}. "
        f"Look at their features, lower LoopConfig.learning_rate, raise "
        'LoopConfig.warmup_steps, or set LoopConfig.mixed_precision = "no".'
    )


def _write(path: Path, content: dict[str, object]) -> None:
    """The file, or none: a full disk must not hide what is wrong with the training."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        replace_file(path, json.dumps(content, indent=1) + "\n")


def _what_happened(step: int, last_step: int, num_skipped: int, weights_are_finite: bool) -> str:
    if not weights_are_finite:
        return f"weights have been infinite or NaN since step {step} or a little before"
    return (
        f"loss or gradient was infinite or NaN in {num_skipped} steps in a row, {step} to {last_step}, which were "
        "skipped (LoopConfig.max_skipped_steps)"
    )
