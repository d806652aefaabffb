"""Folders that appear whole or not at all, also when processes are killed or run side by side."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from data.schemas import InputError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside for the same folder; on entry, what killed processes left is cleaned up.

    Raises:
        InputError: if nothing can be written next to the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _clean_up(folder)
        yield
    finally:
        lock.release()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends, and vanishes when the block fails.

    To be used inside `exclusive(folder)`. Until the end, what `folder` held stays as it was.

    Raises:
        InputError: if the temporary folder cannot be made, written or moved into place (OSError in the block).
    """
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield temporary
        _share(temporary)
        _swap(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path) -> None:
    retired = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(retired)
    temporary.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)


def _clean_up(folder: Path) -> None:
    """Removes temporary folders of killed runs; a folder retired just before the kill comes back."""
    for retired in sorted(folder.parent.glob(f".{folder.name}.old-*")):
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(folder)
    for temporary in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(temporary, ignore_errors=True)


def _share(folder: Path) -> None:
    """Gives the usual modes: mkdtemp and safetensors make what they write unreadable for other users."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def cannot_write(folder: Path, error: OSError) -> InputError:
    """The error for a folder that could not be written, to be raised."""
    return InputError(
        f"cannot write {folder}: {error}. Free space there, make it writable, or choose another place "
        "(DatasetConfig.root); what was there before is untouched."
    )
