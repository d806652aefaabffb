import pytest
import torch
from torch import Tensor

import ops
from ops.cpu import add_rms_norm as implementation
from ops.reference.add_rms_norm import add_rms_norm as reference

SEED = torch.tensor([0x0123456789ABCDEF])


def twin(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return total * (total.square().mean(dim=1, keepdim=True) + eps).rsqrt() * weight, total


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_by_hand() -> None:
    normed, total = ops.add_rms_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([1.0, 2.0]))
    assert total.tolist() == [[3.0, 4.0]]
    # Mean square 12.5.
    torch.testing.assert_close(normed, torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("with_residual", [True, False])
def test_equals_the_twin_across_blocks(num_tokens: int, with_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_BLOCK_ROWS", 20)
    x, weight = random(num_tokens, 5), random(5, seed=2)
    residual = random(num_tokens, 5, seed=1) if with_residual else None
    inputs = [x, weight] if residual is None else [x, weight, residual]
    got, expected = ops.add_rms_norm(x, residual, weight), twin(x, residual, weight)
    factors = random(num_tokens, 5, seed=3), random(num_tokens, 5, seed=4)
    losses = [sum((part * factor).sum() for part, factor in zip(out, factors, strict=True)) for out in (got, expected)]
    for ours, theirs in zip(
        [*got, *torch.autograd.grad(losses[0], inputs)],
        [*expected, *torch.autograd.grad(losses[1], inputs)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    def op(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return ops.add_rms_norm(x, residual, weight, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(op, (random(4, 6), random(4, 6, seed=1), random(6, seed=2)))


def test_dropout_hits_the_new_part_only() -> None:
    torch.manual_seed(0)
    _, total = ops.add_rms_norm(torch.ones(1000, 4), torch.full((1000, 4), 10.0), torch.ones(4), dropout_p=0.5)
    assert set(total.unique().tolist()) == {10.0, 12.0}


def test_bf16_input_keeps_an_fp32_stream() -> None:
    normed, total = ops.add_rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4), torch.ones(4))
    assert (normed.dtype, total.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("seed", [None, SEED])
def test_autocast_narrows_what_is_normed_alone(seed: Tensor | None) -> None:
    x, residual, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4), torch.ones(4)
    inputs = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed, total = ops.add_rms_norm(*inputs, seed=seed)
        exact, _ = ops.add_rms_norm(x.double(), None, weight.double())
    assert (normed.dtype, total.dtype, exact.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    grads = torch.autograd.grad([normed, total], inputs, [torch.ones_like(normed), torch.ones_like(total)])
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected residual of x's shape \[2, 4\] float32 and weight \[4\], got residual \[2, 3\]"
    ):
        ops.add_rms_norm(torch.ones(2, 4), torch.ones(2, 3), torch.ones(4))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_of_the_reference(dropout_p: float) -> None:
    assert torch.autograd.gradcheck(
        lambda x, residual, weight: reference(x, residual, weight, 1e-6, dropout_p, SEED),
        (random(4, 6), random(4, 6, seed=1), random(6, seed=2)),
    )


def test_a_seed_fixes_the_mask() -> None:
    inputs = torch.ones(300, 41), None, torch.ones(41)
    (_, first), (_, again) = (ops.add_rms_norm(*inputs, dropout_p=0.25, seed=SEED) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert abs((first == 0).float().mean().item() - 0.25) < 0.02


def test_a_weight_elsewhere_is_named() -> None:
    with pytest.raises(ValueError, match="one device, got x on cpu, weight on meta"):
        ops.add_rms_norm(torch.ones(2, 4), None, torch.ones(4, device="meta"))
