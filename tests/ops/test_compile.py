"""Every public op is one graph to `torch.compile`, in PyTorch; `tests/kernels` compiles those with kernels."""

from dataclasses import replace

import pytest
import torch

from tests.gpu.accuracy import TINY, cases, run

CASES = cases(TINY)


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name):
    torch.compiler.reset()
    case = CASES[name]
    compiled = replace(case, call=torch.compile(case.call, fullgraph=True, backend="aot_eager"))
    expected = run(case, torch.float32, "cpu", "torch")
    torch.testing.assert_close(run(compiled, torch.float32, "cpu", "torch"), expected)
