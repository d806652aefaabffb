"""The checkpoints of a run: whole or absent, written while training goes on.

A checkpoint is a folder `step_XXXXXXXX` (see checkpoint_files.py) that is written under another name, synced to the
disk and renamed. The newest `keep` stay. `best.safetensors` beside them holds the best weights so far; every checkpoint
carries a copy of the ones that were best at its step, so that resuming from it needs nothing else and damage to one
file leaves the others whole. On the disk that is at most `keep` + 1 checkpoints and two files of weights.

Training waits while its state is copied within memory; a thread writes the copy. What it could not write is raised at
the next call that asks.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.files import copy_synced, disk_problem, file_sha256, sync_file, sync_folder
from data.schemas import InputError
from training.background import BackgroundJobs
from training.checkpoint_files import (
    BEST,
    DamagedCheckpointError,
    StoredWeights,
    host_copy,
    read_checkpoint,
    verify,
    write_checkpoint,
)

_NAME = re.compile(r"step_(\d{8,})")
_WRITING, _REPLACED, _DELETING = ".writing_", ".replaced_", ".deleting_"


class CheckpointStore:
    """The checkpoints of one run. Under several processes only the main one saves, see `on_main`.

    Args:
        folder: created by the run folder.
        keep: number of newest checkpoints that stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._best_path = folder / BEST
        self._best: StoredWeights | None = None  # while jobs run, theirs alone
        self._jobs = BackgroundJobs("checkpoints")

    def clean(self) -> None:
        """Remove what interrupted writes and deletions left behind; a checkpoint about to be replaced comes back."""
        for path in self._folder.glob(f"{_REPLACED}*"):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if not final.exists():
                path.rename(final)
        for path in _leftovers(self._folder):
            shutil.rmtree(path)

    def save(self, step: int, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        """Copy the state, then write a checkpoint and rotate in the background.

        Waits for the checkpoint before it, so that no more than one copy lies in memory.

        Args:
            step: names the checkpoint.
            state: tensors and plain values; read back by torch with weights_only.
            progress: plain values, kept as readable JSON.

        Raises:
            InputError: if an earlier write failed, for instance on a full disk; what was whole before it still is.
        """
        self._after("checkpoint")
        text = json.dumps(dict(progress), indent=2).encode()
        self._jobs.start("checkpoint", partial(self._write, step, host_copy(dict(state)), text))

    def save_best(self, model: nn.Module) -> None:
        """Copy the weights, then replace the best ones in the background, atomically.

        Raises:
            InputError: as `save`.
        """
        self._after("best")
        weights = {name: value.contiguous() for name, value in host_copy(model.state_dict()).items()}
        self._jobs.start("best", partial(self._write_best, weights))

    def raise_failure(self) -> None:
        """Raise the error of a write that failed; does not wait."""
        self._jobs.raise_failure()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            InputError: as `save`.
        """
        self._after(None)

    def close(self) -> None:
        """Let what is being written end; belongs into a `finally`.

        Raises:
            InputError: of a write that failed, unless it was raised before.
        """
        self._jobs.close()

    def last(self) -> Path | None:
        """Newest whole checkpoint, once what is being written is there; reads it to find out."""
        self._jobs.settle()
        return _newest_whole(self._folder)[0]

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights into a model of the same shape, once they are written.

        Raises:
            InputError: as `save`, or if their file was changed since.
        """
        self.wait()
        if self._best is not None:  # only the process that saves knows them
            self._best.require(file_sha256(self._best_path))
        model.load_state_dict(load_file(self._best_path))

    def read(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """`state` and `progress` of a checkpoint that `choose` returned, on the CPU."""
        return read_checkpoint(checkpoint)

    def adopt_best(self, checkpoint: Path | None) -> None:
        """Go back to the best weights that a checkpoint carries; None for the start, where there are none."""
        if checkpoint is None or not (checkpoint / BEST).exists():
            self._best_path.unlink(missing_ok=True)
            self._best = None
            return
        with self._replacing_best() as temporary:
            copy_synced(checkpoint / BEST, temporary)

    def choose(self, resume: str | None, *, discard_newer: bool, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to continue from, verified; None for a fresh start.

        Args:
            resume: None, "auto", or the path of a checkpoint or of a run folder.
            discard_newer: allow continuing from an older checkpoint of this run; the newer ones are removed.
            say: told what was skipped and why.

        Raises:
            InputError: if the path holds no whole checkpoint, if no checkpoint of the run is whole, if newer ones would
                have to be removed, or if a newer version of the library wrote it.
        """
        if resume is None:
            return None
        if resume != "auto":
            return self._choose_path(Path(resume), discard_newer, say)
        chosen, damaged = _newest_whole(self._folder, say)
        if chosen is None and damaged:
            raise InputError(
                f"{self._folder} holds {len(damaged)} checkpoints and none is whole (see the warnings above). "
                "Start again with --overwrite."
            )
        if chosen is None:
            say(f"--resume auto: no checkpoint in {self._folder}, starting from the beginning")
        for path in damaged:
            _discard(path)
        return chosen

    def _choose_path(self, path: Path, discard_newer: bool, say: Callable[[str], None]) -> Path:
        if (path / "checkpoints").is_dir():
            whole = _newest_whole(path / "checkpoints", say)[0]
            if whole is None:
                raise InputError(f"--resume {path}: that run has no whole checkpoint.")
            path = whole
        try:
            verify(path)
        except DamagedCheckpointError as error:
            raise InputError(f"--resume {path}: not a whole checkpoint ({error}). Choose another one.") from error
        own = {other.resolve(): other for other in _checkpoints(self._folder)}
        newer = [other for other in own.values() if path.resolve() in own and _step(other) > _step(path)]
        if newer and not discard_newer:
            raise InputError(
                f"--resume {path}: the run went on to {newer[-1].name}. Use --resume auto to continue from there, or "
                "add --overwrite to remove the later checkpoints."
            )
        for other in newer:
            _discard(other)
        return path

    def _after(self, kind: str | None) -> None:
        """Wait for the jobs of a kind, or for all, and raise what failed."""
        self._jobs.settle(kind)
        self._jobs.raise_failure()

    def _write(self, step: int, state: Mapping[str, Any], progress: bytes) -> None:
        final = self._folder / f"step_{step:08d}"
        temporary = final.with_name(f"{_WRITING}{final.name}")
        try:
            temporary.mkdir()
            write_checkpoint(temporary, step=step, state=state, progress=progress, best=self._best)
            _move(temporary, final)
            for old in _checkpoints(self._folder)[: -self._keep]:
                _discard(old)
        except OSError as error:
            raise self._write_error(error, final) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_best(self, weights: dict[str, Tensor]) -> None:
        with self._replacing_best() as temporary:
            save_file(weights, temporary)
            sync_file(temporary)

    @contextmanager
    def _replacing_best(self) -> Iterator[Path]:
        """A path that holds the best weights once the block has written it through to the disk."""
        folder = self._folder / f"{_WRITING}best"  # where safetensors has a temporary file of its own, too
        try:
            folder.mkdir()
            yield folder / BEST
            written = StoredWeights(self._best_path, file_sha256(folder / BEST))
            os.replace(folder / BEST, self._best_path)
            sync_folder(self._folder)
            self._best = written
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            raise self._write_error(error, self._best_path) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write_error(self, error: Exception, path: Path) -> InputError:
        last = _newest_whole(self._folder)[0]
        kept = f"The last whole checkpoint is {last}." if last else "There is no earlier checkpoint."
        return InputError(
            f"could not write {path}: {disk_problem(error) or error}. {kept} Free space or make the folder writable, "
            "then --resume auto."
        )


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint and the best weights from a folder, and nothing else."""
    for path in _checkpoints(folder):
        _discard(path)
    for path in _leftovers(folder):
        shutil.rmtree(path)
    for path in folder.glob(f"*{BEST}*"):
        path.unlink()


def _newest_whole(folder: Path, say: Callable[[str], None] = lambda line: None) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that verifies, and the damaged ones that are newer."""
    damaged: list[Path] = []
    for path in reversed(_checkpoints(folder)):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            say(f"warning: skipping the damaged checkpoint {path}: {error}")
            damaged.append(path)
        else:
            return path, damaged
    return None, damaged


def _checkpoints(folder: Path) -> list[Path]:
    """All by step, whole or not."""
    folders = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _leftovers(folder: Path) -> list[Path]:
    return [path for prefix in (_WRITING, _REPLACED, _DELETING) for path in folder.glob(f"{prefix}*")]


def _move(temporary: Path, final: Path) -> None:
    """Give a written checkpoint its name, durably; one that has the name already goes, or comes back after a crash."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _discard(path: Path) -> None:
    """Remove a checkpoint; interrupted, it is a leftover rather than a damaged checkpoint."""
    doomed = path.with_name(f"{_DELETING}{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
