"""Claim: the loss over a level's codes with its gradient in one pass is faster than PyTorch's, compiled or not.

As many rows as a training batch has targets and levels (256 x 4) and more, 256 codes; forward and backward each.

    python -m benchmarks.cross_entropy
    python -m benchmarks.cross_entropy --quick --device cpu
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import begin, finish, parser
from benchmarks.rungs import DTYPES, Builder, Rung, allow_repeated_backward, contest, dtypes_of, values_of
from training.cli import run_cli

NUM_CODES = 256


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """Log-softmax and gather, spelled out."""
    return -logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def torch_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own, on fp32 logits, as our op computes."""
    return F.cross_entropy(logits.float(), target, reduction="none")


def ours(logits: Tensor, target: Tensor) -> Tensor:
    """The fused op."""
    return ops.cross_entropy_small_vocab(logits, target)


def builders(logits: Tensor, target: Tensor, grad: Tensor) -> dict[str, Builder]:
    """Every implementation on the same numbers."""

    def build(function: Callable[..., Tensor]) -> Builder:
        return lambda: Rung(lambda logits: function(logits, target), {"logits": logits}, (grad,))

    return {
        "ours": build(ours),
        "eager": build(eager),
        "eager_compiled": build(torch.compile(eager, dynamic=False)),
        "torch_cross_entropy": build(torch_cross_entropy),
        "torch_cross_entropy_compiled": build(torch.compile(torch_cross_entropy, dynamic=False)),
    }


def run(num_rows: int, *, device: str, dtype_name: str, repeats: int) -> list[dict[str, Any]]:
    """Result rows of one shape and precision."""
    torch.compiler.reset()
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[dtype_name]
    logits = torch.randn(num_rows, NUM_CODES, generator=generator).to(device, dtype).requires_grad_()
    target = torch.randint(NUM_CODES, (num_rows,), generator=generator).to(device)
    grad = torch.randn(num_rows, generator=generator).to(device)
    exact, exact_target = logits.detach().double().cpu().requires_grad_(), target.cpu()
    expected = values_of(
        Rung(
            lambda logits: F.cross_entropy(logits, exact_target, reduction="none"),
            {"logits": exact},
            (grad.double().cpu(),),
        )
    )
    return contest(
        f"{num_rows:,} x {NUM_CODES}, {dtype_name}",
        builders(logits, target, grad),
        expected,
        dtype=dtype,
        device=device,
        repeats=repeats,
    )


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device = begin(arguments)
    allow_repeated_backward()
    rows = []
    for dtype_name in dtypes_of(device)[: 1 if arguments.quick else None]:
        for num_rows in (1024, 16384):
            rows += run(num_rows, device=device, dtype_name=dtype_name, repeats=5 if arguments.quick else 100)
    finish("cross_entropy", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
