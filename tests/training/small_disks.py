"""Disks that are full: really, or by a limit on the size of files."""

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 KiB, as under a quota.

    Left before the test ends: pytest's own output may be a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


class SmallDisk:
    """A file system of its own in a folder."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        self._mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs")

    def fill(self, *, but: int = 0) -> None:
        """Leave so many bytes free."""
        self._filler.write_bytes(bytes(shutil.disk_usage(self.folder).free - but))

    def empty(self) -> None:
        """Remove what `fill` wrote."""
        self._filler.unlink()

    def forbid_writing(self) -> None:
        """Nobody may write any more, root neither."""
        self._mount("-o", "remount,ro")

    def _mount(self, *arguments: str) -> None:
        command = ["mount", *arguments, str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """A small file system while the block runs; the test is skipped where mounting is not allowed."""
    try:
        disk = SmallDisk(folder, num_bytes)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small file system is not allowed here ({error})")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a run keeps its folder's lock while it lives
