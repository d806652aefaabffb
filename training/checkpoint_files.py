"""The files of one checkpoint: written through to the disk, and compared with their checksums before they are read.

state.pt           tensors and plain values, for torch with weights_only
progress.json      where training stands, for people too
best.safetensors   the best weights so far, where there are any
manifest.json      sha256 of each of them, and of itself
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import copy_synced, file_sha256, json_sha256, stream_synced, sync_folder, write_synced
from data.schemas import InputError

BEST = "best.safetensors"
_FORMAT = 2  # 1 had no checksum of the manifest itself
_STATE = "state.pt"
_PROGRESS = "progress.json"
_MANIFEST = "manifest.json"
_OWN_CHECKSUM = "manifest_sha256"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what was written; the message says in what way."""


@dataclass(frozen=True)
class StoredWeights:
    """Weights on the disk.

    Attributes:
        sha256: of the file when it was written.
    """

    path: Path
    sha256: str

    def require(self, sha256: str) -> None:
        """Compare with what was read just now.

        Raises:
            InputError: if the file has changed.
        """
        if sha256 != self.sha256:
            raise InputError(
                f"{self.path} was changed after it was written, by another program or a failing disk. --resume auto "
                "goes back to the best weights of the last checkpoint."
            )


def host_copy(value: Any) -> Any:
    """The value with each tensor as a copy of its own in host memory, so that nothing done later changes it.

    Args:
        value: tensors and plain values in dictionaries, lists and tuples; waits for the tensors that a device computes.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: host_copy(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(content) for content in value)
    return value


def write_checkpoint(
    folder: Path, *, step: int, state: Mapping[str, Any], progress: bytes, best: StoredWeights | None
) -> None:
    """Fill an empty folder; afterwards all of it is on the disk.

    Args:
        folder: where.
        step: noted in the manifest.
        state: as `host_copy` returns it.
        progress: JSON.
        best: copied, since a second name of the same file would be damaged with it.

    Raises:
        OSError: if the disk does not take it.
        InputError: if the best weights are not what was written.
    """
    digests = {
        _STATE: stream_synced(folder / _STATE, lambda file: torch.save(dict(state), file)),
        _PROGRESS: write_synced(folder / _PROGRESS, progress),
    }
    if best is not None:
        digests[BEST] = copy_synced(best.path, folder / BEST)
        best.require(digests[BEST])
    manifest: dict[str, Any] = {"format": _FORMAT, "step": step, "sha256": digests}
    manifest[_OWN_CHECKSUM] = json_sha256(manifest)
    write_synced(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())
    sync_folder(folder)


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State, on the CPU, and progress of a checkpoint that was verified."""
    state = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    return state, json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint with its manifest; reads each file once, about a second per GB.

    Raises:
        DamagedCheckpointError: if the folder or a file is missing, changed, or not listed.
        InputError: if a newer version of this library wrote it.
    """
    listed = _listed(checkpoint)
    present = {path.name for path in checkpoint.iterdir()} - {_MANIFEST}
    for name in sorted(present | listed.keys() | {_STATE, _PROGRESS}):
        if name not in present:
            raise DamagedCheckpointError(f"{name} is missing")
        if name not in listed:
            raise DamagedCheckpointError(f"{name} is not in {_MANIFEST}")
        if _digest(checkpoint / name) != listed[name]:
            raise DamagedCheckpointError(f"{name} was truncated or changed")


def _listed(checkpoint: Path) -> dict[str, str]:
    """Digests by file name, of a manifest that is itself whole."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedCheckpointError(f"{_MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{_MANIFEST} is not readable") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise DamagedCheckpointError(f"{_MANIFEST} is not that of a checkpoint")
    own = manifest.pop(_OWN_CHECKSUM, None)
    if own != (None if manifest.get("format") == 1 else json_sha256(manifest)):
        raise DamagedCheckpointError(f"{_MANIFEST} was changed")
    if manifest["format"] > _FORMAT:
        raise InputError(
            f"{checkpoint} was written by a newer version of this library (checkpoint format {manifest['format']}, "
            f"this one reads up to {_FORMAT}). Update the library, or start again with --overwrite."
        )
    return manifest["sha256"]


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path.name}: {error.strerror}") from error
