"""recommend.py in a process of its own that starts fast: a server has imported what is slow to import, and forks."""

import multiprocessing
import os
import sys

import torch

import recommend

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["recommend", "evaluate", "training.cli", "serving.answers", "serving.processes"])


def start(*argv, **environment):
    """A started process; it ends with the exit code of `recommend.main`."""
    process = CONTEXT.Process(target=_run, args=(list(argv), environment))
    process.start()
    return process


def _run(argv, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)  # with another number of threads the last digits of scores differ
    sys.exit(recommend.main(argv))
