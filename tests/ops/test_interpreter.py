"""Runs tests/kernels in Triton's interpreter, which has to be chosen before Triton is imported.

A process per file, so that a failure names the file, and one of them can be run alone as its error message says. Each
computes on one thread, so as many run at a time as there are processors.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (REPOSITORY / "tests/kernels").glob("test_*.py"))


@pytest.fixture(scope="module")
def runs(request) -> "Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]":
    """A process for each file that is tested."""
    cases = [item for item in request.session.items if item.name.startswith(test_kernels_in_the_interpreter.__name__)]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {item.callspec.params["file"]: pool.submit(run, item.callspec.params["file"]) for item in cases}
    pool.shutdown(cancel_futures=True)


def run(file: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"]
    command.append(f"tests/kernels/{file}")
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file, runs):
    result = runs[file].result()
    if result.returncode != 0:
        pytest.fail(report(file, result), pytrace=False)
    *_, summary = result.stdout.splitlines()
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary


def report(file: str, result: "subprocess.CompletedProcess[str]") -> str:
    """How to run it alone, the failures without the dots before them, and errors of the process itself."""
    failures = result.stdout[max(0, result.stdout.find("= FAILURES =")) :]
    by_hand = f"TRITON_INTERPRET=1 python -m pytest tests/kernels/{file}"
    return f"{by_hand}\n{failures[:8000]}\n{result.stdout[-1500:]}\n{result.stderr[-2000:]}"


def test_there_are_kernels_to_test():
    assert {"test_add_rms_norm.py", "test_mutations.py", "test_library.py", "test_model.py"} <= set(FILES)
