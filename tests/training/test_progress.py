"""The bar on a terminal: a child process draws it on a pseudo-terminal, and what arrives there is looked at."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest

from training.progress import Progress

WIDTH = 60

SCRIPT = """
import logging, sys, time, warnings
from training.progress import Progress

early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())
progress = Progress(num_steps=40, bar=None, enabled=True)
progress.start(3)
for step in range(4, 41):
    progress.advance()
    if step == 10:
        early.warning("from a handler")
        logging.getLogger("bare").warning("without a handler")
        warnings.warn("a warning", stacklevel=1)
        progress.say("a line")
        progress.log(step, loss=0.5, learning_rate=1e-3, examples_per_second=1234.0, left=9.0)
    time.sleep(0.01)
progress.close()
logging.getLogger("bare").warning("after the bar")
"""


def on_terminal(columns):
    """Lines that arrive on a terminal, split where the bar is drawn again."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=follower, stdout=follower)
    os.close(follower)
    received = b""
    try:
        while part := os.read(leader, 4096):
            received += part
    except OSError:  # Linux says so at the end
        pass
    os.close(leader)
    assert process.wait(timeout=30) == 0
    return [line for line in re.split(r"[\r\n]", received.decode()) if line.strip()]


@pytest.fixture(scope="module")
def lines():
    return on_terminal(WIDTH)


def test_lines_of_loggers_and_warnings_stand_whole_above_the_bar(lines):
    assert {"from a handler", "without a handler", "a line", "after the bar"} <= set(lines)
    assert any(re.fullmatch(r"<string>:14: UserWarning: a warning", line) for line in lines)
    bars = [line for line in lines if "40 [" in line]
    assert len(bars) > 5
    assert all(re.match(r" *\d+%\|", line) for line in bars)


def test_no_line_is_longer_than_the_terminal(lines):
    assert max(map(len, lines)) <= WIDTH


def test_a_narrow_terminal():
    assert max(len(line) for line in on_terminal(24) if "%" in line) <= 24


def test_handlers_and_warnings_are_put_back(capsys):
    handler = logging.StreamHandler()
    logging.getLogger("kept").addHandler(handler)
    before = (handler.stream, logging.lastResort, warnings.showwarning)
    progress = Progress(num_steps=2, bar=True, enabled=True)
    progress.start(0)
    assert handler.stream is not before[0]
    progress.close()
    assert (handler.stream, logging.lastResort, warnings.showwarning) == before
    logging.getLogger("kept").removeHandler(handler)


def test_without_a_terminal_there_are_lines(capsys):
    progress = Progress(num_steps=10, bar=None, enabled=True)
    progress.start(0)
    progress.advance()
    progress.log(1, loss=0.5, learning_rate=1e-3, examples_per_second=1234.0, left=9.0)
    progress.close()
    assert capsys.readouterr().err == "step 1/10  loss 0.5  lr 1.00e-03  examples/s 1,234  00:09 left\n"


@pytest.mark.parametrize("bar", [None, True, False])
def test_processes_other_than_the_main_one_say_nothing(capsys, bar):
    progress = Progress(num_steps=10, bar=bar, enabled=False)
    progress.start(0)
    progress.advance()
    progress.log(1, loss=0.5, learning_rate=1e-3, examples_per_second=1234.0, left=9.0)
    progress.say("a line")
    progress.close()
    assert capsys.readouterr() == ("", "")
