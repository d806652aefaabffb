"""Lives of a training script: started in no time, watched, and ended by a signal.

Importing torch takes longer than what a life is killed in, so a server process imports the scripts once and forks one
child per life, before any thread exists in it. In the child runs what the command line runs: `training.cli.main`.
"""

import ctypes
import faulthandler
import functools
import importlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

from training.cli import main

_PRELOADED = (
    *("train_decoder", "torch._dynamo", "triton.language", "polars", "sympy"),
    *("matplotlib.pyplot", "sklearn.decomposition", "sklearn.feature_extraction.text", "scipy.stats"),
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # lives compute the same however many of them run at a time
    "PYTHONWARNINGS": "ignore:resource_tracker",  # which finds that the killed did not clean up
}
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line \d+ in (?P<function>\S+)')
_PATIENCE_SECONDS = 300

Frame = tuple[str, str]
"""A file and a function in it."""


class Life:
    """One life of a script.

    Args:
        arguments: of the script train_decoder.py, without its name.
        log: file that gets what the life prints.
        file_size_limit: bytes that it may write to one file, as a quota would allow.
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, file_size_limit: int | None = None) -> None:
        self.log = log
        self._stack = log.with_suffix(".stack")
        log.write_bytes(b"")
        self._stack.write_bytes(b"")
        given = (list(arguments), log, self._stack, file_size_limit)
        self._process = _server().Process(target=_live, args=given, daemon=True)
        self._process.start()

    def alive(self) -> bool:
        """Whether it is still running."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self, patience: float = _PATIENCE_SECONDS) -> int:
        """Wait for its end; returns the exit code, the negative number of a signal that ended it.

        Raises:
            TimeoutError: if it hangs.
        """
        self._process.join(patience)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"a life went on for {patience:.0f} s after it should have ended")
        return self._process.exitcode

    def kill(self) -> list[Frame]:
        """SIGKILL; returns what its threads were doing a moment before, innermost frames first."""
        if self.alive():
            self.signal(signal.SIGUSR1)
            deadline = time.monotonic() + 0.05
            while not self._stack.stat().st_size and time.monotonic() < deadline:
                time.sleep(0.0002)
        self._process.kill()
        self._process.join()
        return [(match["file"], match["function"]) for match in _FRAME.finditer(self._stack.read_text())]

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_words(self) -> str:
        """The end of what it has printed, on one line."""
        return " | ".join(line.strip()[-400:] for line in self.printed().strip().splitlines()[-3:])


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """The server, running; what it needs in its environment is not left in that of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _live(arguments: list[str], log: Path, stack: Path, file_size_limit: int | None) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_OF_PARENT, signal.SIGKILL)
    with log.open("ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR1, file=stack.open("w"), all_threads=True)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    sys.exit(main(importlib.import_module("train_decoder").train, "train_decoder", arguments))
