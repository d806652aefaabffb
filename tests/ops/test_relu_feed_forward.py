import pytest
import torch
from torch import Tensor

import ops
from ops.cpu import relu_feed_forward as implementation
from ops.reference.relu_feed_forward import relu_feed_forward as reference

SEED = torch.tensor([0x0123456789ABCDEF])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("num_tokens", [0, 1, 63])
def test_equals_the_twin_across_blocks(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_BLOCK_ROWS", 20)
    inputs = random(num_tokens, 4), random(7, 4, seed=1), random(4, 7, seed=2)
    got, expected = ops.relu_feed_forward(*inputs), (inputs[0] @ inputs[1].t()).relu() @ inputs[2].t()
    torch.testing.assert_close(got, expected)
    factor = random(num_tokens, 4, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad((got * factor).sum(), inputs),
        torch.autograd.grad((expected * factor).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_with_dropout() -> None:
    def op(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return ops.relu_feed_forward(*inputs, dropout_p=0.4)

    assert torch.autograd.gradcheck(op, (random(5, 4), random(7, 4, seed=1), random(4, 7, seed=2)))


def test_dropout_zeroes_hidden_units_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    hidden = ops.relu_feed_forward(torch.ones(1000, 1), torch.ones(8, 1), torch.ones(1, 8), dropout_p=0.5)
    assert set(hidden.unique().tolist()) <= {2.0 * count for count in range(9)}
    assert abs(hidden.mean().item() / 8 - 1) < 0.05


def test_autocast_computes_in_the_lower_dtype() -> None:
    x, w_in, w_out = (tensor.detach().float().requires_grad_() for tensor in (random(5, 4), random(7, 4), random(4, 7)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.relu_feed_forward(x, w_in, w_out)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_the_reference(dropout_p: float) -> None:
    inputs = (random(5, 4), random(7, 4, seed=1), random(4, 7, seed=2))
    assert torch.autograd.gradcheck(lambda *inputs: reference(*inputs, dropout_p, SEED), inputs)


def test_a_seed_fixes_the_mask() -> None:
    inputs = (torch.ones(100, 1), torch.ones(80, 1), torch.ones(1, 80))
    first, again = (ops.relu_feed_forward(*inputs, dropout_p=0.5, seed=SEED) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert abs(first.mean().item() / 80 - 1) < 0.05


def test_wrong_shapes_and_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected w_in \[F, 4\] and w_out \[4, F\]"):
        ops.relu_feed_forward(torch.ones(2, 4), torch.ones(7, 3), torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"of one dtype, got torch.bfloat16, torch.float32 and torch.float32"):
        ops.relu_feed_forward(torch.ones(2, 4).bfloat16(), torch.ones(7, 4), torch.ones(4, 7))
    with pytest.raises(ValueError, match="one device, got x on cpu, w_in on meta"):
        ops.relu_feed_forward(torch.ones(2, 4), torch.ones(7, 4, device="meta"), torch.ones(4, 7))
