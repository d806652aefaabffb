"""Ctrl-C and SIGTERM: the running step ends, a checkpoint is saved, the program leaves with code 130.

The second one does not wait, not even for a checkpoint that is being written.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130
_ECHO_SECONDS = 2.0
"""A launcher such as torchrun passes on the Ctrl-C that the terminal has sent to its processes already."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped because the user or the system asked for it; what was reached is saved.

    A KeyboardInterrupt, so that code which handles ordinary errors lets it pass.
    """


class LeaveAtOnce(KeyboardInterrupt):
    """The second signal: nothing is waited for; what is half written is cleaned up by the next start."""


class _InterruptedEvaluationError(KeyboardInterrupt):
    """Leaves an evaluation at once; training state is untouched by evaluations."""


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that unfinished files are cleaned up and the exit code is that of Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class InterruptGuard:
    """Notes the first signal instead of dying from it; a second one, meant as such, raises LeaveAtOnce.

    Outside the main thread, where Python allows no signal handlers, it does nothing.

    Attributes:
        requested: there was a signal.
        insisted: there was a second one.
    """

    def __init__(self) -> None:
        self.requested = False
        self.insisted = False
        self._requested_at = 0.0
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Around work that may take minutes and changes nothing: a signal leaves it at once, and quietly."""
        self._immediate = True
        try:
            yield
        except _InterruptedEvaluationError:
            pass
        finally:
            self._immediate = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._requested_at > _ECHO_SECONDS:
                self.insisted = True
                raise LeaveAtOnce
            return
        self.requested, self._requested_at = True, time.monotonic()
        if self._immediate:
            raise _InterruptedEvaluationError
