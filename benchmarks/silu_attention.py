"""Claim: pointwise SiLU attention over packed rows is faster than over padded ones, in no more memory.

Forward and backward, with a bias by distance and its gradient: on the lengths of real histories (Amazon Beauty, at most
20 items, the sizes of configs/hstu_beauty.gin), and on rows of 1 to 200 items, as many of each length. Both
implementations compute the output and the gradients of queries, keys, values and bias, and are verified against double
precision first. What a model does once per batch (the mask) is not timed.

    padded_torch  padded rows: einsum, bias, SiLU, mask, einsum, as HSTU's authors spell it out

    python -m benchmarks.silu_attention
    python -m benchmarks.silu_attention --quick --device cpu
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import begin, finish, parser
from benchmarks.histories import MAX_HISTORY, add_lengths_argument, read_lengths
from benchmarks.rungs import DTYPES, Builder, Named, Rung, contest, dtypes_of, values_of
from ops.reference.jagged_to_padded import jagged_to_padded, padded_to_jagged
from training.cli import run_cli

NUM_HEADS, HEAD_DIM, LONGEST = 4, 16, 200
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Problem:
    """Attention within packed rows: the numbers that every implementation gets.

    Attributes:
        fused: [T, 3, H, D] leaf: queries, keys and values, as one product makes them.
        bias: [max_len, H] leaf.
        offsets: [B+1] int32.
        max_len: longest row.
        grad: [T, H, D] incoming gradient.
    """

    fused: Tensor
    bias: Tensor
    offsets: Tensor
    max_len: int
    grad: Tensor

    @property
    def inputs(self) -> Named:
        """What gets gradients."""
        return {"fused": self.fused, "bias": self.bias}


def make_problem(lengths: Tensor, *, device: str, dtype: torch.dtype) -> Problem:
    """Random numbers for rows of the given lengths."""
    generator = torch.Generator().manual_seed(0)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    num_tokens, max_len = int(offsets[-1]), int(lengths.max())

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return Problem(
        fused=leaf(num_tokens, 3, NUM_HEADS, HEAD_DIM),
        bias=leaf(max_len, NUM_HEADS, dtype=torch.float32),
        offsets=offsets.to(device),
        max_len=max_len,
        grad=leaf(num_tokens, NUM_HEADS, HEAD_DIM).detach(),
    )


def ours(problem: Problem) -> Rung:
    """The fused op as the model calls it."""
    p = problem

    def attend(fused: Tensor, bias: Tensor) -> Tensor:
        q, k, v = fused.unbind(1)
        return ops.jagged_silu_attention(
            q, k, v, p.offsets, max_len=p.max_len, scale=SCALE, normalizer=p.max_len, bias=bias
        )

    return Rung(attend, p.inputs, (p.grad,))


def padded_torch(problem: Problem) -> Rung:
    """Products over padded rows, whose values are compared in the packed layout."""
    p = problem

    def pad(tensor: Tensor) -> Tensor:
        return jagged_to_padded(tensor.detach(), p.offsets, p.max_len, 0.0)

    def canonical(values: Named) -> Named:
        packed = {"out", "fused"} & values.keys()
        return values | {name: padded_to_jagged(values[name], p.offsets, len(p.fused)) for name in packed}

    inputs = {"fused": pad(p.fused).requires_grad_(), "bias": p.bias}
    return Rung(_padded_attention(p.max_len, p.fused.device), inputs, (pad(p.grad),), canonical)


def _padded_attention(max_len: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Of [B, max_len, 3, H, D]; places behind a row hold zeros, which add nothing."""
    place = torch.arange(max_len, device=device)
    distance = (place[:, None] - place).clamp(min=0)
    sees = torch.ones(max_len, max_len, device=device).tril()

    def attend(fused: Tensor, bias: Tensor) -> Tensor:
        q, k, v = fused.unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE + bias[distance].permute(2, 0, 1).to(q.dtype)
        weights = F.silu(scores) / max_len * sees.to(q.dtype)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    return attend


def expected_values(problem: Problem) -> Named:
    """Output and gradients in double precision, by the padded products."""
    p = problem
    fused, bias, grad = (tensor.detach().double().cpu() for tensor in (p.fused, p.bias, p.grad))
    exact = Problem(fused.requires_grad_(), bias.requires_grad_(), p.offsets.cpu(), p.max_len, grad)
    return values_of(padded_torch(exact))


def builders(problem: Problem) -> dict[str, Builder]:
    """Both implementations of a problem."""
    return {"ours": lambda: ours(problem), "padded_torch": lambda: padded_torch(problem)}


def run(case: str, lengths: Tensor, *, device: str, dtype_name: str, repeats: int) -> list[dict[str, Any]]:
    """Result rows of rows of some lengths in one precision."""
    dtype = DTYPES[dtype_name]
    problem = make_problem(lengths, device=device, dtype=dtype)
    about = f"{case}, {len(lengths)} rows, {len(problem.fused):,} tokens, {dtype_name}"
    expected = expected_values(problem)
    return contest(about, builders(problem), expected, dtype=dtype, device=device, repeats=repeats)


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    real, source = read_lengths(arguments.lengths)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.from_numpy(real)[torch.randint(len(real), (256,), generator=generator)]
    cases = {source: (chosen - 2).clamp(1, MAX_HISTORY), f"1 to {LONGEST} items": torch.arange(1, LONGEST + 1, 2)}
    rows = []
    for dtype_name in dtypes_of(device)[: 1 if arguments.quick else None]:
        for case, lengths in cases.items():
            repeats = 5 if arguments.quick else 50
            rows += run(case, lengths, device=device, dtype_name=dtype_name, repeats=repeats)
    finish("silu_attention", rows, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
