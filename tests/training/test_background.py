import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from training.background import BackgroundJobs


class FailedError(Exception):
    pass


def fail():
    raise FailedError("the disk")


@pytest.fixture
def jobs():
    return BackgroundJobs("test")


def test_jobs_run_beside_the_caller_and_in_order(jobs):
    go, done = threading.Event(), []
    jobs.start("slow", lambda: (go.wait(10), done.append("slow")))
    jobs.start("fast", lambda: done.append("fast"))
    assert done == []
    go.set()
    jobs.settle()
    assert done == ["slow", "fast"]


def test_waiting_for_one_kind_leaves_the_others_running(jobs):
    go, done = threading.Event(), []
    jobs.start("first", lambda: done.append("first"))
    jobs.start("second", lambda: go.wait(10))
    jobs.settle("first")
    jobs.settle("never started")
    assert done == ["first"]
    go.set()
    jobs.close()


def test_the_job_after_a_failure_is_dropped_and_the_failure_kept(jobs):
    done = []
    jobs.start("bad", fail)
    jobs.start("behind", lambda: done.append("behind"))
    jobs.settle()
    assert done == []
    for _ in range(2):
        with pytest.raises(FailedError, match="the disk"):
            jobs.raise_failure()
    jobs.close()  # the error was seen


def test_closing_raises_a_failure_that_nobody_has_seen(jobs):
    jobs.start("bad", fail)
    with pytest.raises(FailedError, match="the disk"):
        jobs.close()


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from training.background import BackgroundJobs

def write():
    started.set()
    time.sleep(0.3)
    Path(sys.argv[1]).write_text("whole")

started, jobs = threading.Event(), BackgroundJobs("test")
jobs.start("write", write)
started.wait()
if sys.argv[2] == "interrupted":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in children of background jobs
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    jobs.settle()
"""


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("interrupted", -signal.SIGINT)])
def test_a_program_that_ends_lets_the_running_job_end(tmp_path, how, code):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "file"), how]
    repository = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "file").read_text() == "whole"
