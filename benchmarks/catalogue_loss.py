"""Claim: the loss over a whole catalogue is faster than PyTorch's with all logits in memory, in a fraction of it.

As many queries as a batch has rows (256) or positions (2,048), catalogues of Amazon Beauty's size and of 100,000 items;
forward and backward each, from unit vectors divided by a temperature.

    python -m benchmarks.catalogue_loss
    python -m benchmarks.catalogue_loss --quick --device cpu
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import begin, finish, parser
from benchmarks.histories import NUM_ITEMS
from benchmarks.rungs import DTYPES, Builder, Named, Rung, contest, dtypes_of
from training.cli import run_cli

SCALE = 1 / 0.07
_BLOCK_ROWS = 128


def torch_full_logits(queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own, on the logits of all rows and items, in fp32 as our op computes."""
    return F.cross_entropy(F.linear(queries, items).float() * SCALE, target)


def ours(queries: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Never holds all logits."""
    return ops.catalogue_cross_entropy(queries, items, target, scale=SCALE)


def expected_values(queries: Tensor, items: Tensor, target: Tensor) -> Named:
    """Mean loss, and the gradients of the rows' sum, in double precision, some rows at a time."""
    inputs = {name: value.detach().cpu().double().requires_grad_() for name, value in _named(queries, items).items()}
    wanted, total = target.cpu(), 0.0
    for begin_row in range(0, len(queries), _BLOCK_ROWS):
        rows = slice(begin_row, begin_row + _BLOCK_ROWS)
        logits = inputs["queries"][rows] @ inputs["items"].t() * SCALE
        loss = F.cross_entropy(logits, wanted[rows], reduction="sum")
        loss.backward()
        total += loss.item()
    gradients = {name: value.grad for name, value in inputs.items() if value.grad is not None}
    return {"out": torch.tensor(total / len(queries), dtype=torch.float64)} | gradients


def _named(queries: Tensor, items: Tensor) -> Named:
    return {"queries": queries, "items": items}


def run(
    num_rows: int, num_items: int, width: int, *, device: str, dtype_name: str, repeats: int
) -> list[dict[str, Any]]:
    """Result rows of one shape and precision."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[dtype_name]
    queries, items = (
        F.normalize(torch.randn(count, width, generator=generator)).to(device, dtype).requires_grad_()
        for count in (num_rows, num_items)
    )
    target = torch.randint(num_items, (num_rows,), generator=generator).to(device)
    # The gradients of the rows' sum: those of their mean would all be smaller than what may differ.
    grad = torch.tensor(float(num_rows), device=device)

    def build(function: Callable[..., Tensor]) -> Builder:
        return lambda: Rung(lambda queries, items: function(queries, items, target), _named(queries, items), (grad,))

    return contest(
        f"{num_rows:,} x {num_items:,}, width {width}, {dtype_name}",
        {"ours": build(ours), "torch_full_logits": build(torch_full_logits)},
        expected_values(queries, items, target),
        dtype=dtype,
        device=device,
        repeats=repeats,
    )


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments = parser(__doc__).parse_args(argv)
    device = begin(arguments)
    rows = []
    sizes = itertools.product((256, 2048), (NUM_ITEMS, 100_000), (64, 128))
    for num_rows, num_items, width in [(256, NUM_ITEMS, 64)] if arguments.quick else sizes:
        for dtype_name in dtypes_of(device)[: 1 if arguments.quick else None]:
            repeats = 5 if arguments.quick else 10 if device == "cpu" else 50
            rows += run(num_rows, num_items, width, device=device, dtype_name=dtype_name, repeats=repeats)
    finish("catalogue_loss", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
