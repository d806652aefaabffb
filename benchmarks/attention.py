"""Claim (one H100): fused jagged attention is at least as fast as padded SDPA with bias and as FlexAttention.

Forward and backward each, on the lengths of real histories (Amazon Beauty, batch 256): the encoder's attention with
T5's relative bias, the decoder's causal one over four tokens, and cross attention, which has no bias. Every
implementation computes the output and the gradients of queries, keys, values and bias table, and is verified against
double precision first. What a model does once per batch (padding mask, document mask) is not timed.

    sdpa_with_bias        padded rows; the float mask is made of table and padding, and passes its gradient to the table
    sdpa_ready_mask       the same with the mask given and no gradient for it: less work than ours, a bound
    padded_eager          padded rows, products and softmax spelled out
    flex_attention        packed rows, document mask, bias by score_mod, compiled; on a CPU it has no backward
    flash_varlen_no_bias  packed rows, half precision, no bias: less work than ours, a bound (CUDA)

    python -m benchmarks.attention
    python -m benchmarks.attention --quick --device cpu
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import begin, finish, parser
from benchmarks.histories import LEVEL_SIZES, add_lengths_argument, typical_batch
from benchmarks.rungs import (
    DTYPES,
    Builder,
    Named,
    Rung,
    UnavailableError,
    allow_repeated_backward,
    contest,
    dtypes_of,
    values_of,
)
from ops.reference.jagged_attention import jagged_attention as reference_attention
from ops.reference.jagged_to_padded import jagged_to_padded, padded_to_jagged, row_mask
from ops.reference.relative_buckets import relative_buckets
from training.cli import run_cli

NUM_HEADS, HEAD_DIM, NUM_BUCKETS, MAX_DISTANCE = 6, 64, 32, 128


@dataclass(frozen=True)
class Problem:
    """Attention over packed rows: the numbers that every implementation gets.

    Attributes:
        q, k, v: [T, H, D] leaves.
        table: [buckets, H] leaf, or None for no bias.
        offsets_q, offsets_k: [B+1] int32; the same tensor in self attention.
        max_q, max_k: longest rows.
        grad: [Tq, H, D] incoming gradient.
        causal, dropout_p: options.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    offsets_q: Tensor
    offsets_k: Tensor
    max_q: int
    max_k: int
    grad: Tensor
    causal: bool = False
    dropout_p: float = 0.0

    @property
    def is_self(self) -> bool:
        """Whether queries and keys belong to the same tokens."""
        return self.offsets_q is self.offsets_k

    def with_table(self, inputs: Named) -> Named:
        """The inputs and the table, where there is one."""
        return inputs if self.table is None else inputs | {"table": self.table}


def make_problem(
    lengths_q: Tensor,
    lengths_k: Tensor | None,
    *,
    bias: bool,
    device: str,
    dtype: torch.dtype,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Problem:
    """Random numbers for rows of the given lengths; `lengths_k` None is self attention."""
    generator = torch.Generator().manual_seed(0)
    offsets_q = _offsets(lengths_q).to(device)
    offsets_k = offsets_q if lengths_k is None else _offsets(lengths_k).to(device)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    num_q, num_k = int(offsets_q[-1]), int(offsets_k[-1])
    return Problem(
        q=leaf(num_q, NUM_HEADS, HEAD_DIM),
        k=leaf(num_k, NUM_HEADS, HEAD_DIM),
        v=leaf(num_k, NUM_HEADS, HEAD_DIM),
        table=leaf(NUM_BUCKETS, NUM_HEADS, dtype=torch.float32) if bias else None,
        offsets_q=offsets_q,
        offsets_k=offsets_k,
        max_q=int(offsets_q.diff().max()),
        max_k=int(offsets_k.diff().max()),
        grad=leaf(num_q, NUM_HEADS, HEAD_DIM).detach(),
        causal=causal,
        dropout_p=dropout_p,
    )


def expected_values(problem: Problem) -> Named:
    """Output and gradients in double precision, without dropout."""
    p = problem

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().cpu().requires_grad_()

    def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        offsets = (p.offsets_q.cpu(), p.offsets_k.cpu(), p.max_q, p.max_k)
        kv = torch.stack([k, v], dim=1)
        return reference_attention(q, kv, *offsets, HEAD_DIM**-0.5, table, MAX_DISTANCE, p.causal, 0.0)

    inputs = p.with_table({"q": p.q, "k": p.k, "v": p.v})
    return values_of(Rung(forward, {name: double(value) for name, value in inputs.items()}, (p.grad.double().cpu(),)))


def ours(problem: Problem) -> Rung:
    """The fused op as the model calls it: one tensor for keys and values, and queries where they belong together."""
    p = problem
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "dropout_p": p.dropout_p, "max_distance": MAX_DISTANCE}
    if p.is_self:
        fused = torch.stack([p.q, p.k, p.v], dim=1).detach().requires_grad_()

        def attend_self(qkv: Tensor, table: Tensor | None = None) -> Tensor:
            return ops.jagged_self_attention(
                qkv, p.offsets_q, max_len=p.max_q, bias_table=table, causal=p.causal, **options
            )

        return Rung(attend_self, p.with_table({"qkv": fused}), (p.grad,), _split("qkv", "qkv"))

    fused = torch.stack([p.k, p.v], dim=1).detach().requires_grad_()

    def attend(q: Tensor, kv: Tensor, table: Tensor | None = None) -> Tensor:
        return ops.jagged_attention(
            q, kv, p.offsets_q, p.offsets_k, max_q=p.max_q, max_k=p.max_k, bias_table=table, **options
        )

    return Rung(attend, p.with_table({"q": p.q, "kv": fused}), (p.grad,), _split("kv", "kv"))


def _split(name: str, parts: str) -> Any:
    """Canonical names of a fused tensor's gradient."""

    def canonical(values: Named) -> Named:
        rest = {key: value for key, value in values.items() if key != name}
        return rest | dict(zip(parts, values[name].unbind(1), strict=True)) if name in values else rest

    return canonical


def sdpa_with_bias(problem: Problem) -> Rung:
    """Padded `scaled_dot_product_attention` whose mask holds bias and padding."""
    mask_of = _mask_maker(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        mask = mask_of(table).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, problem.dropout_p, scale=HEAD_DIM**-0.5)

    return _padded(problem, attend)


def sdpa_ready_mask(problem: Problem) -> Rung:
    """The same with the mask given, which gets no gradient."""
    if problem.table is None:
        raise UnavailableError("there is no bias, so it is sdpa_with_bias")
    mask = _mask_maker(problem)(problem.table).detach().to(problem.q.dtype).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, problem.dropout_p, scale=HEAD_DIM**-0.5)

    return _padded(problem, attend, with_table=False)


def padded_eager(problem: Problem) -> Rung:
    """Products, mask, softmax and dropout as separate ops, as in Hugging Face T5."""
    mask_of = _mask_maker(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + mask_of(table).to(q.dtype)
        probabilities = scores.float().softmax(-1).to(q.dtype)
        return F.dropout(probabilities, problem.dropout_p) @ v

    return _padded(problem, attend)


def _mask_maker(problem: Problem) -> Any:
    """Float mask [B or 1, H or 1, max_q, max_k] of a table; buckets and padding are ready before."""
    p = problem
    hidden = ~row_mask(p.offsets_k, p.max_k)[:, None, None, :]
    if p.causal:
        hidden = hidden | torch.ones(p.max_q, p.max_k, dtype=torch.bool, device=p.q.device).triu(1)
    padding = torch.zeros(hidden.shape, device=p.q.device).masked_fill_(hidden, -30000.0)
    buckets = relative_buckets(p.max_q, p.max_k, NUM_BUCKETS, MAX_DISTANCE, p.causal).to(p.q.device)

    def mask_of(table: Tensor | None) -> Tensor:
        return padding if table is None else table[buckets].permute(2, 0, 1) + padding

    return mask_of


def _padded(problem: Problem, attend: Any, *, with_table: bool = True) -> Rung:
    """A rung over [B, H, max, D] blocks, whose values are compared in the packed layout."""
    p = problem

    def pad(tensor: Tensor, offsets: Tensor, max_len: int) -> Tensor:
        return jagged_to_padded(tensor.detach(), offsets, max_len, 0.0).transpose(1, 2).contiguous()

    def canonical(values: Named) -> Named:
        layouts = {"out": p.offsets_q, "q": p.offsets_q, "k": p.offsets_k, "v": p.offsets_k}
        tokens = {"out": len(p.q), "q": len(p.q), "k": len(p.k), "v": len(p.k)}
        return {
            name: padded_to_jagged(value.transpose(1, 2), layouts[name], tokens[name]) if name in layouts else value
            for name, value in values.items()
        }

    inputs = {
        "q": pad(p.q, p.offsets_q, p.max_q).requires_grad_(),
        "k": pad(p.k, p.offsets_k, p.max_k).requires_grad_(),
        "v": pad(p.v, p.offsets_k, p.max_k).requires_grad_(),
    }
    return Rung(attend, p.with_table(inputs) if with_table else inputs, (pad(p.grad, p.offsets_q, p.max_q),), canonical)


def flex_attention(problem: Problem) -> Rung:
    """FlexAttention over the packed tokens as one sequence."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    if problem.dropout_p > 0.0:
        raise UnavailableError("it has no dropout")
    p = problem
    device = p.q.device
    row_q, row_k = (_rows(offsets, len(x)) for offsets, x in ((p.offsets_q, p.q), (p.offsets_k, p.k)))

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = row_q[query] == row_k[key]
        return same & (query >= key) if p.causal else same

    block_mask = create_block_mask(visible, None, None, len(p.q), len(p.k), device=str(device))
    farthest = p.max_q
    buckets = _buckets_by_distance(farthest, p.causal).to(device)
    compiled = torch.compile(flex, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        score_mod = None
        if table is not None:
            by_distance = table[buckets]  # [2 * farthest + 1, H]

            def add_bias(score: Tensor, _b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                distance = torch.clamp(key - query, -farthest, farthest)
                return score + by_distance[distance + farthest, head]

            score_mod = add_bias
        out = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=HEAD_DIM**-0.5)
        return out[0].transpose(0, 1)

    inputs = p.with_table({"q": p.q, "k": p.k, "v": p.v})
    if device.type == "cpu":
        return Rung(attend, {name: value.detach() for name, value in inputs.items()}, (p.grad,), backward=False)
    return Rung(attend, inputs, (p.grad,))


def flash_varlen_no_bias(problem: Problem) -> Rung:
    """PyTorch's flash attention over packed rows."""
    p = problem
    if p.q.device.type != "cuda" or p.q.dtype == torch.float32:
        raise UnavailableError("needs a GPU and half precision")
    if p.dropout_p > 0.0:
        raise UnavailableError("it has no dropout")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UnavailableError(f"torch {torch.__version__} has no varlen_attn") from error
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5}
    parameters = inspect.signature(varlen_attn).parameters
    if p.causal:
        options |= {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    options = {name: value for name, value in options.items() if name in parameters}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, p.offsets_q, p.offsets_k, p.max_q, p.max_k, **options)
        assert isinstance(out, Tensor)
        return out

    return Rung(attend, {"q": p.q, "k": p.k, "v": p.v}, (p.grad,), exact=p.table is None)


IMPLEMENTATIONS = (
    ours,
    sdpa_with_bias,
    sdpa_ready_mask,
    padded_eager,
    flex_attention,
    flash_varlen_no_bias,
)


def builders(problem: Problem, names: Sequence[str] | None = None) -> dict[str, Builder]:
    """Every implementation of a problem, or those named."""
    chosen = [function for function in IMPLEMENTATIONS if names is None or function.__name__ in names]
    return {function.__name__: lambda function=function: function(problem) for function in chosen}  # type: ignore[misc]


def problems(lengths: Tensor, *, device: str, dtype: torch.dtype) -> dict[str, Problem]:
    """The attentions of a model whose rows have these lengths."""
    levels = torch.full_like(lengths, len(LEVEL_SIZES))
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "encoder, bias": make_problem(lengths, None, bias=True, **on),
        "encoder, bias, dropout 0.1": make_problem(lengths, None, bias=True, dropout_p=0.1, **on),
        "decoder, causal, bias": make_problem(levels, None, bias=True, causal=True, **on),
        "cross, no bias": make_problem(levels, lengths, bias=False, **on),
    }


def run(
    lengths: Tensor, *, device: str, dtype_name: str, repeats: int, case: str = "", names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Result rows of one precision."""
    dtype = DTYPES[dtype_name]
    rows = []
    for name, problem in problems(lengths, device=device, dtype=dtype).items():
        torch.compiler.reset()  # each problem is compiled for its own shapes
        rows += contest(
            f"{case}{dtype_name}, {name}",
            builders(problem, names),
            expected_values(problem),
            dtype=dtype,
            device=device,
            repeats=repeats,
            expected_exactly=problem.dropout_p == 0.0,
        )
    return rows


def main(argv: Sequence[str]) -> int:
    """Verify, measure, write."""
    arguments_of = parser(__doc__)
    add_lengths_argument(arguments_of)
    arguments_of.add_argument("--batch-size", type=int, default=256)
    arguments = arguments_of.parse_args(argv)
    device = begin(arguments)
    allow_repeated_backward()
    batch, case = typical_batch(arguments.lengths, arguments.batch_size, "cpu")
    rows = []
    for dtype_name in dtypes_of(device)[: 1 if arguments.quick else None]:
        repeats = 5 if arguments.quick else 50
        rows += run(batch.offsets.diff(), device=device, dtype_name=dtype_name, repeats=repeats, case=f"{case}, ")
    finish("attention", rows, arguments, device)
    return 0


def _buckets_by_distance(farthest: int, causal: bool) -> Tensor:
    """[2 * farthest + 1] bucket of every distance from -farthest to farthest."""
    size = 2 * farthest + 1
    return relative_buckets(size, size, NUM_BUCKETS, MAX_DISTANCE, causal)[farthest]


def _rows(offsets: Tensor, num_tokens: int) -> Tensor:
    """[T] row of every token."""
    numbers = torch.arange(len(offsets) - 1, dtype=torch.int32, device=offsets.device)
    return torch.repeat_interleave(numbers, offsets.diff(), output_size=num_tokens)


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
