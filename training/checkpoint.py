"""Checkpoints that are whole or absent.

A checkpoint is a folder `step_XXXXXXXX` that is written under another name, synced to the disk and renamed; its
`manifest.json` holds the sha256 of every file, and nothing is loaded before all of them agree. The newest
`keep` are kept. `best.safetensors` beside them holds the best weights so far; every checkpoint carries the ones that
were best at its step (a hard link, no second copy), so that resuming from it needs nothing else.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from data.files import disk_problem, file_sha256, sync_file, sync_folder, write_synced
from data.schemas import InputError

_FORMAT = 1
_STATE = "state.pt"
_PROGRESS = "progress.json"
_MANIFEST = "manifest.json"
BEST = "best.safetensors"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was written; the message says in what way."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created by the run folder; leftovers of interrupted writes in it are removed.
        keep: number of newest checkpoints that stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self.best_path = folder / BEST
        self._temporary_best = folder / f".{BEST}.tmp"

    def clean(self) -> None:
        """Remove what interrupted writes and deletions left behind."""
        for pattern in (".writing_*", ".deleting_*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path)
        self._temporary_best.unlink(missing_ok=True)

    def last(self) -> Path | None:
        """Newest checkpoint by name, not verified."""
        return max(self._all(), default=None)

    def save(self, step: int, state: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
        """Write a checkpoint and rotate.

        Args:
            step: names the checkpoint.
            state: tensors and plain values; read back by torch with weights_only.
            progress: plain values, kept as readable JSON.

        Raises:
            InputError: if it cannot be written, for instance on a full disk; the earlier checkpoints are untouched.
        """
        final = self._folder / f"step_{step:08d}"
        temporary = self._folder / f".writing_{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(temporary, step, state, progress)
            if final.exists():
                self._discard(final)
            os.rename(temporary, final)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._write_error(error, final) from error
        for old in sorted(self._all())[: -self._keep]:
            self._discard(old)
        return final

    def save_best(self, model: nn.Module) -> None:
        """Replace the best weights, atomically.

        Raises:
            InputError: if they cannot be written; the earlier ones are untouched.
        """
        try:
            save_model(model, str(self._temporary_best))
            sync_file(self._temporary_best)
            os.replace(self._temporary_best, self.best_path)
            sync_folder(self._folder)
        except (OSError, SafetensorError) as error:
            self._temporary_best.unlink(missing_ok=True)
            raise self._write_error(error, self.best_path) from error

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights into a model of the same shape."""
        load_model(model, self.best_path)

    def read(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """`state` and `progress` of a checkpoint that `choose` returned, on the CPU."""
        state = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
        return state, json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))

    def adopt_best(self, checkpoint: Path | None) -> None:
        """Go back to the best weights that a checkpoint carries; None for the start, where there are none."""
        if checkpoint is None or not (checkpoint / BEST).exists():
            self.best_path.unlink(missing_ok=True)
            return
        _link(checkpoint / BEST, self._temporary_best)
        os.replace(self._temporary_best, self.best_path)
        self._temporary_best.unlink(missing_ok=True)  # replacing a name of a file by another of it leaves both

    def choose(self, resume: str | None, *, discard_newer: bool, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to continue from, verified; None for a fresh start.

        Args:
            resume: None, "auto", or the path of a checkpoint or of a run folder.
            discard_newer: allow continuing from an older checkpoint of this run; the newer ones are removed.
            say: told what was chosen, what was skipped and why.

        Raises:
            InputError: if the path holds no whole checkpoint, if no checkpoint of the run is whole, or if newer ones
                would have to be removed.
        """
        if resume is None:
            return None
        if resume != "auto":
            return self._choose_path(Path(resume), discard_newer)
        chosen, damaged = self._newest_whole(self._folder, say)
        if chosen is None and damaged:
            raise InputError(
                f"{self._folder} holds {len(damaged)} checkpoints and none is whole (see the warnings above). "
                "Start again with --overwrite."
            )
        if chosen is None:
            say(f"--resume auto: no checkpoint in {self._folder}, starting from the beginning")
        for path in damaged:
            self._discard(path)
        return chosen

    def _choose_path(self, path: Path, discard_newer: bool) -> Path:
        if (path / "checkpoints").is_dir():
            whole = self._newest_whole(path / "checkpoints", lambda line: None)[0]
            if whole is None:
                raise InputError(f"--resume {path}: that run has no whole checkpoint.")
            path = whole
        try:
            verify(path)
        except DamagedCheckpointError as error:
            raise InputError(f"--resume {path}: not a whole checkpoint ({error}). Choose another one.") from error
        newer = [
            other for other in self._all() if path.parent.resolve() == self._folder.resolve() and other.name > path.name
        ]
        if newer and not discard_newer:
            raise InputError(
                f"--resume {path}: the run went on to {max(newer).name}. Use --resume auto to continue from there, or "
                "add --overwrite to remove the later checkpoints."
            )
        for other in newer:
            self._discard(other)
        return path

    def _newest_whole(self, folder: Path, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
        damaged: list[Path] = []
        for path in sorted(folder.glob("step_*"), reverse=True):
            try:
                verify(path)
            except DamagedCheckpointError as error:
                say(f"warning: skipping the damaged checkpoint {path}: {error}")
                damaged.append(path)
            else:
                return path, damaged
        return None, damaged

    def _write(self, folder: Path, step: int, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        digests = {
            _STATE: write_synced(folder / _STATE, buffer.getbuffer()),
            _PROGRESS: write_synced(folder / _PROGRESS, json.dumps(dict(progress), indent=2).encode()),
        }
        if self.best_path.exists():
            _link(self.best_path, folder / BEST)
            digests[BEST] = file_sha256(folder / BEST)
        manifest = {"format": _FORMAT, "step": step, "sha256": digests}
        write_synced(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
        sync_folder(folder)

    def _write_error(self, error: Exception, path: Path) -> InputError:
        last = self.last()
        kept = f"The last whole checkpoint is {last}." if last else "There is no earlier checkpoint."
        return InputError(
            f"could not write {path}: {disk_problem(error) or error}. {kept} Free space, then --resume auto."
        )

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint; interrupted, it is a leftover rather than a damaged checkpoint."""
        doomed = path.with_name(f".deleting_{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    def _all(self) -> list[Path]:
        return list(self._folder.glob("step_*"))


def verify(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: if the folder or a file is missing, changed or of a newer format.
    """
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        version, digests = manifest["format"], dict(manifest["sha256"])
    except OSError as error:
        raise DamagedCheckpointError(f"{_MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{_MANIFEST} is not readable") from error
    if version != _FORMAT:
        raise DamagedCheckpointError(f"format {version}, this version reads format {_FORMAT}")
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{name} is missing")
        if file_sha256(path) != digest:
            raise DamagedCheckpointError(f"{name} was truncated or changed")


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint and the best weights from a folder, and nothing else."""
    for pattern in ("step_*", ".writing_*", ".deleting_*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for path in folder.glob(f"*{BEST}*"):
        path.unlink()


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is only ever replaced, never changed; a copy where links are not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
