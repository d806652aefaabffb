"""Claim: residual addition, dropout and norm in one op are faster than the same written in PyTorch, compiled or not.

On as many rows as a training batch has tokens (Amazon Beauty, batch 256), forward and backward each, without dropout,
where all are verified against double precision, and with it. The compiled rung is PyTorch's own fusion.

    python -m benchmarks.add_rms_norm
    python -m benchmarks.add_rms_norm --quick --device cpu
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import begin, finish, parser
from benchmarks.histories import add_lengths_argument, typical_batch
from benchmarks.rungs import DTYPES, Builder, Named, Rung, allow_repeated_backward, contest, dtypes_of, values_of
from ops.reference.add_rms_norm import add_rms_norm as reference_add_rms_norm
from training.cli import run_cli

EPS = 1e-6


def eager(x: Tensor, residual: Tensor, weight: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """As Hugging Face T5 writes it, statistics in fp32."""
    total = residual + F.dropout(x, dropout_p)
    rstd = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (total * rstd).to(x.dtype), total


def torch_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """With PyTorch's own norm."""
    total = residual + F.dropout(x, dropout_p)
    return F.rms_norm(total, weight.shape, weight, EPS), total


def ours(x: Tensor, residual: Tensor, weight: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The fused op."""
    return ops.add_rms_norm(x, residual, weight, eps=EPS, dropout_p=dropout_p)


def builders(inputs: Named, grads: tuple[Tensor, ...], dropout_p: float) -> dict[str, Builder]:
    """Every implementation on the same numbers."""

    def build(function: Callable[..., tuple[Tensor, ...]]) -> Builder:
        return lambda: Rung(lambda **values: function(**values, dropout_p=dropout_p), inputs, grads)

    return {
        "ours": build(ours),
        "eager": build(eager),
        "eager_compiled": build(torch.compile(eager, dynamic=False)),
        "torch_rms_norm": build(torch_rms_norm),
        "torch_rms_norm_compiled": build(torch.compile(torch_rms_norm, dynamic=False)),
    }


def run(
    num_rows: int, width: int, *, dropout_p: float, device: str, dtype_name: str, repeats: int, case: str = ""
) -> list[dict[str, Any]]:
    """Result rows of one shape and precision."""
    torch.compiler.reset()
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[dtype_name]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {"x": randn(num_rows, width), "residual": randn(num_rows, width), "weight": randn(width)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    grads = (randn(num_rows, width), randn(num_rows, width))
    exact = {name: value.detach().double().cpu().requires_grad_() for name, value in inputs.items()}
    expected = values_of(
        Rung(
            lambda x, residual, weight: reference_add_rms_norm(x, residual, weight, EPS, 0.0),
            exact,
            tuple(grad.double().cpu() for grad in grads),
        )
    )
    return contest(
        f"{case}{num_rows:,} x {width}, {dtype_name}, dropout {dropout_p}",
        builders(inputs, grads, dropout_p),
        expected,
        dtype=dtype,
        device=device,
        repeats=repeats,
        expected_exactly=dropout_p == 0.0,
    )


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments_of.add_argument("--d-model", type=int, nargs="+", default=[128, 384])
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    allow_repeated_backward()
    batch, case = typical_batch(arguments.lengths, 256, "cpu")
    repeats = 5 if arguments.quick else 100
    rows = []
    for dtype_name in dtypes_of(device)[: 1 if arguments.quick else None]:
        for width in arguments.d_model:
            for dropout_p in (0.0, 0.1):
                rows += run(
                    len(batch.tokens),
                    width,
                    dropout_p=dropout_p,
                    device=device,
                    dtype_name=dtype_name,
                    repeats=repeats,
                    case=f"{case}: ",
                )
    finish("add_rms_norm", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
