import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.read_ahead import ReadAhead

REPOSITORY = Path(__file__).resolve().parents[2]


class Recorded:
    """Tenfold steps; notes which were asked for, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.threads: set[str] = set()
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, step: int) -> int:
        assert self.may_go.wait(timeout=20)
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        return 10 * step


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 seconds"
        time.sleep(0.002)


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_values_are_those_of_the_steps_in_any_order(depth):
    ahead = ReadAhead(lambda step: 10 * step, depth)
    for step in [0, 1, 2, 3, 7, 8, 2, 2, 1, 0, 4, 3]:
        assert ahead(step) == 10 * step


def test_each_step_is_made_once_and_only_depth_steps_ahead():
    make = Recorded()
    ahead = ReadAhead(make, 2)
    assert ahead(5) == 50
    until(lambda: len(make.steps) == 3)
    time.sleep(0.05)
    assert make.steps == [5, 6, 7]
    assert [ahead(6), ahead(7)] == [60, 70]
    until(lambda: len(make.steps) == 5)
    assert make.steps == [5, 6, 7, 8, 9]
    assert make.threads == {"read-ahead_0"}


def test_a_jump_drops_what_was_made_ahead():
    make = Recorded()
    ahead = ReadAhead(make, 2)
    ahead(0)
    until(lambda: len(make.steps) == 3)
    assert ahead(100) == 1000
    until(lambda: len(make.steps) == 6)
    assert make.steps == [0, 1, 2, 100, 101, 102]


def test_without_depth_there_is_no_thread():
    before, make = reading_threads(), Recorded()
    assert ReadAhead(make, 0)(3) == 30
    assert make.steps == [3]
    assert reading_threads() == before


def test_an_error_is_raised_at_its_step_and_asking_again_tries_again():
    failures = [2]

    def make(step: int) -> int:
        if step in failures:
            raise OSError("the disk is gone")
        return step

    ahead = ReadAhead(make, 2)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(2)
    failures.clear()
    assert [ahead(2), ahead(3)] == [2, 3]


def test_the_thread_ends_with_the_object():
    gc.disable()  # reference counts alone must do
    try:
        before = reading_threads()
        ahead = ReadAhead(lambda step: step, 2)
        ahead(0)
        assert len(reading_threads() - before) == 1
        del ahead
        until(lambda: not reading_threads() - before)
    finally:
        gc.enable()


def test_an_interrupted_wait_leaves_it_usable():
    make = Recorded()
    ahead = ReadAhead(make, 2)
    ahead(0)
    until(lambda: len(make.steps) == 3)
    make.may_go.clear()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            ahead(50)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    make.may_go.set()
    assert [ahead(50), ahead(51), ahead(52)] == [500, 510, 520]


def _send_steps(ahead: ReadAhead[int], sender) -> None:
    sender.send([ahead(step) for step in (2, 3, 9)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_process_makes_its_own():
    ahead = ReadAhead(Recorded(), 2)
    assert [ahead(0), ahead(1)] == [0, 10]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_steps, args=(ahead, sender))
    child.start()
    assert receiver.poll(20), "the forked process waits for ever"
    assert receiver.recv() == [20, 30, 90]
    child.join(20)
    assert child.exitcode == 0
    assert ahead(2) == 20


INTERRUPTED = """
import os, signal, time
from data.read_ahead import ReadAhead
ahead = ReadAhead(lambda step: time.sleep(0.01) or step, 2)
for step in range(100_000):
    assert ahead(step) == step
    if step == 5:
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_ends_the_program():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert result.returncode == -signal.SIGINT
    assert result.stderr.splitlines()[-1] == "KeyboardInterrupt"
