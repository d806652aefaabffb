"""The kernels' tests run in Triton's interpreter on the CPU, in a process of their own, or compiled on a GPU.

`tests/ops/test_interpreter.py` starts that process. Run one file of it by hand with

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_add_rms_norm.py
"""

import importlib.util
import os

import pytest
import torch

import ops
from tests.kernels.poison import poisoned_memory

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # they import it; test_interpreter.py is skipped for them, visibly

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device():
    """Where kernels can run in this process; for the length of the test ops use them, and fresh memory is poisoned."""
    if not INTERPRETING and not torch.cuda.is_available():
        pytest.skip("kernels run here only in the interpreter's process (see test_interpreter.py) or on a GPU")
    with ops.use_backend("triton"), poisoned_memory():
        yield torch.device("cpu" if INTERPRETING else "cuda")
