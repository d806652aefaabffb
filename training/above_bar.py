"""Lines of logging and warnings, kept apart from a progress bar on the same terminal."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


@contextmanager
def lines_above_bars() -> Iterator[None]:
    """While it lasts, what loggers and warnings write to the terminal stands above tqdm's bars, whole."""
    handlers = [(handler, handler.stream) for handler in _terminal_handlers()]
    last_resort, show_warning = logging.lastResort, warnings.showwarning
    try:
        for handler, stream in handlers:
            handler.setStream(_AboveBars(stream))
        logging.lastResort = logging.StreamHandler(_AboveBars(sys.stderr))
        logging.lastResort.setLevel(logging.WARNING)
        warnings.showwarning = _show_warning_above
        yield
    finally:
        logging.lastResort, warnings.showwarning = last_resort, show_warning
        for handler, stream in handlers:
            handler.setStream(stream)


class _AboveBars:
    """A stream for handlers, which write whole lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


def _terminal_handlers() -> list[Any]:
    """Handlers of all loggers that write to stderr or stdout."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]  # placeholders among them have no handlers
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return [handler for handler in handlers if getattr(handler, "stream", None) in (sys.stderr, sys.stdout)]


def _show_warning_above(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    tqdm.write(text, file=file or sys.stderr, end="")
