"""Compares an op's Triton twin with its PyTorch reference in double precision: every output and every gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}
"""Relative and absolute, for values of size one: a few units of the dtype's last place."""

SEED = 0x0123456789ABCDEF


def seed_on(device: torch.device) -> Tensor:
    """[1] int64 dropout seed whose both halves count."""
    return torch.tensor([SEED], device=device)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """[B+1] int32 boundaries."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def compare(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    keep_dtype: Sequence[str] = (),
    tolerance: tuple[float, float] | None = None,
) -> None:
    """Assert that outputs and gradients of both agree.

    Args:
        kernel: called with the inputs by name, in `dtype` on `device`.
        reference: called with the same values in float64 on the CPU.
        inputs: floating-point tensors; each one gets a gradient.
        dtype: of the inputs.
        device: of the inputs.
        keep_dtype: inputs that stay fp32, such as norm weights.
        tolerance: relative and absolute; None takes the dtype's.
    """
    dtypes = {name: torch.float32 if name in keep_dtype else dtype for name in inputs}
    ours = {name: value.to(device, dtypes[name]).requires_grad_() for name, value in inputs.items()}
    exact = {name: value.to(dtypes[name]).double().requires_grad_() for name, value in inputs.items()}
    got, expected = _tuple(kernel(**ours)), _tuple(reference(**exact))
    relative, absolute = tolerance or TOLERANCES[dtype]
    grads = [randn(*output.shape, seed=100 + index).to(output.dtype) for index, output in enumerate(got)]
    got_grads = torch.autograd.grad(got, list(ours.values()), [grad.to(device) for grad in grads])
    expected_grads = torch.autograd.grad(expected, list(exact.values()), [grad.double() for grad in grads])
    names = [f"output {index}" for index in range(len(got))] + [f"gradient of {name}" for name in inputs]
    for name, ours_value, exact_value in zip(names, (*got, *got_grads), (*expected, *expected_grads), strict=True):
        scale = max(1.0, float(exact_value.detach().abs().max())) if exact_value.numel() else 1.0
        torch.testing.assert_close(
            ours_value.detach().cpu().double(), exact_value.detach(), rtol=relative, atol=absolute * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
