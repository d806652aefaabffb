"""Files and folders that appear whole or not at all: the ground floor of everything that writes.

A crash, a signal, a full disk or a second process leaves either the old content or the new.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock
from safetensors import SafetensorError

from data.schemas import InputError

_PATH = re.compile(r"(?<![\w.])/[\w./-]+/([\w.-]+)")

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def disk_problem(error: BaseException) -> str | None:
    """What is wrong with the disk or its permissions in words, or None when the error is something else."""
    return _DISK_ERRORS.get(error.errno or 0) if isinstance(error, OSError) else None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the block name the file that they are about: the system names none once a file is open."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_synced(path: Path, data: bytes | memoryview) -> str:
    """Write a new file through to the disk; returns the sha256 of what was written."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def stream_synced(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Write a new file through to the disk while its content is made, without a copy of it in memory.

    Args:
        path: of the file.
        write: gets the open file, of which it uses `write` and `flush`.

    Returns:
        The sha256 of what was written.
    """
    with path.open("wb") as file:
        stream = _HashedStream(file)
        write(cast(BinaryIO, stream))
        if stream.error is not None:
            raise stream.error
        file.flush()
        os.fsync(file.fileno())
    return stream.sha256.hexdigest()


def copy_synced(source: Path, target: Path) -> str:
    """Copy a file through to the disk; returns the sha256 of what was copied."""
    with source.open("rb") as file:
        return stream_synced(target, lambda stream: shutil.copyfileobj(file, stream))


class _HashedStream:
    """The open end of a file. A failed write is kept, and what follows it dropped: torch.save hides it otherwise."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        """What is left in memory is written at the end, where it may fail."""


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file or replace its content, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            write_synced(temporary, data.encode("utf-8") if isinstance(data, str) else data)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # of a file system that has become read-only
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Write what the system still holds of a file through to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_sha256(content: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        clean_up(folder)
        yield
    finally:
        lock.release()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends, and vanishes when the block fails.

    Where several processes may write the same folder, to be used inside `exclusive(folder)`. Until the end, what
    `folder` held stays as it was.

    Raises:
        InputError: if the temporary folder cannot be made, written or moved into place (OSError in the block).
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield temporary
        share(temporary)
        _swap(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, folder: Path) -> None:
    retired = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(retired)
    try:
        temporary.rename(folder)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Remove what killed processes left of `replaced_folder`; a folder retired just before the kill comes back."""
    for retired in sorted(folder.parent.glob(f".{folder.name}.old-*")):
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(folder)
    for temporary in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(temporary, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file, or a folder and all in it, the usual modes: mkdtemp and safetensors write for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for entry in (path, *path.rglob("*")):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)


def cannot_write(folder: Path, error: Exception) -> InputError:
    """The error for a folder that could not be written, to be raised."""
    return InputError(
        f"cannot write {folder}: {disk_problem(error) or error}. Free space there, make it writable, or choose another "
        "place; what was there before is untouched."
    )


def without_paths(text: str) -> str:
    """The text with absolute paths cut to their last part: what is published is for other machines too."""
    return _PATH.sub(r"\1", text)
