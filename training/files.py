"""Writing files so that a crash, a signal or a full disk leaves either the old content or the new."""

import errno
import hashlib
import os
from pathlib import Path

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


def write_synced(path: Path, data: bytes | memoryview) -> str:
    """Write a new file through to the disk; returns the sha256 of what was written."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def replace_file(path: Path, data: bytes | str) -> None:
    """Write a file or replace its content, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(temporary, data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
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


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
