"""A test that cannot fail proves nothing: what is not written must be seen."""

import pytest
import torch

from ops.triton import add_rms_norm
from tests.kernels import test_add_rms_norm
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_floats_are_nan(dtype):
    x = torch.zeros(2, dtype=dtype)
    with poisoned_memory():
        fresh = torch.empty(3, dtype=dtype), torch.empty_like(x), x.new_empty(2, 2)
        leaf = torch.empty(3, requires_grad=True)
    assert all(bool(tensor.isnan().all()) for tensor in (*fresh, leaf))
    assert leaf.is_leaf
    assert torch.empty is torch._C._VariableFunctions.empty


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_fresh_whole_numbers_are_absurd(dtype):
    with poisoned_memory():
        assert int(torch.empty(2, dtype=dtype).min()) > 1 << 30
    with poisoned_memory():
        assert bool(torch.empty(2, dtype=torch.bool).all())


@pytest.mark.parametrize("name", ["FORWARD", "BACKWARD"])
def test_an_op_that_writes_nothing_fails(device, monkeypatch, name):
    fake = getattr(add_rms_norm, f"_fake_{name.lower()}")
    monkeypatch.setattr(add_rms_norm, name, fake)
    with pytest.raises(AssertionError, match="nan"):
        test_add_rms_norm.check(device, torch.float32, test_add_rms_norm.case(3, 16))
