"""The kernels' tests run in Triton's interpreter on the CPU, in a process of their own, or compiled on a GPU.

`tests/ops/test_interpreter.py` starts that process. Run one file of it by hand with

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_add_rms_norm.py
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import ops
from tests.kernels.poison import poisoned_memory

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # they import it; test_interpreter.py is skipped for them, visibly

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    """Skip what needs kernels where they cannot run; by a mark, so that the summary has one line per file."""
    if INTERPRETING or torch.cuda.is_available():
        return
    reason = "kernels run here only in the interpreter's process (see test_interpreter.py) or on a GPU"
    for item in items:
        if Path(__file__).parent in item.path.parents and "device" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    """Where kernels can run in this process; for the length of the test ops use them, and fresh memory is poisoned."""
    with ops.use_backend("triton"), poisoned_memory():
        yield torch.device("cpu" if INTERPRETING else "cuda")
