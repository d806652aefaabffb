"""Token embeddings of code tuples, with a gradient that adds up in a fixed order.

The backward sorts the tokens. One kernel sums equal tokens within every chunk of the sorted list, a second one adds the
chunks' sums of every row of the table: a token that occurs a thousand times keeps no program longer than the others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ops.triton.library import define
from ops.triton.parts import cdiv, dot, power_of_2, wide

_CHUNK = 32
"""Sorted tokens per program of the first backward kernel."""

_PIECES = 16
"""Chunks whose sums the second one reads at once."""


@triton.jit
def _semantic_id_embedding_fwd_kernel(
    codes_ptr,  # [B * L] int64
    table_ptr,  # [num_tokens, D]
    level_offsets_ptr,  # [L] int64
    positions_ptr,  # [L, D]; read only if HAS_POSITIONS
    out_ptr,  # [B * L, D] out
    tokens_ptr,  # [B * L] int32 out, rows of the table; num_tokens for a code without one
    num_codes,
    num_levels,
    num_tokens,
    width,
    column_blocks,
    HAS_POSITIONS: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_block = tl.program_id(0) % column_blocks
    at = tl.program_id(0) // column_blocks * CODES + tl.arange(0, CODES)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    code = tl.load(codes_ptr + at, mask=at < num_codes, other=-1)
    level = at % num_levels
    token = code + tl.load(level_offsets_ptr + level)
    # The upper bound keeps a wrong code, which is not checked on a device, from reading foreign memory.
    known = (code >= 0) & (token >= 0) & (token < num_tokens)
    token = tl.where(known, token, num_tokens)
    tl.store(tokens_ptr + at, token.to(tl.int32), mask=(at < num_codes) & (column_block == 0))
    mask = known[:, None] & (columns < width)[None, :]
    row = wide(tl.load(table_ptr + token[:, None] * width + columns[None, :], mask=mask, other=0.0))
    if HAS_POSITIONS:
        place = level.to(tl.int64)[:, None] * width + columns[None, :]
        row += wide(tl.load(positions_ptr + place, mask=mask, other=0.0))
    stored = (at < num_codes)[:, None] & (columns < width)[None, :]
    place = at.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_ptr + place, row.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _semantic_id_embedding_bwd_chunks_kernel(
    grad_ptr,  # [N, D]
    sorted_ptr,  # [N] int32 tokens in ascending order
    order_ptr,  # [N] int64, where each of them came from
    sums_ptr,  # [N, D] fp32 out; written only where a token starts within a chunk: its sum over the chunk
    num_codes,
    num_tokens,
    width,
    column_blocks,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0) // column_blocks * CHUNK + tl.arange(0, CHUNK)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(sorted_ptr + at, mask=at < num_codes, other=num_tokens)
    again = tl.load(sorted_ptr + at, mask=at < num_codes, other=num_tokens)
    before = tl.load(sorted_ptr + at - 1, mask=(at > 0) & (at < num_codes), other=-1)
    known = token < num_tokens
    source = tl.load(order_ptr + at, mask=known, other=0)
    mask = known[:, None] & (columns < width)[None, :]
    grad = wide(tl.load(grad_ptr + source[:, None] * width + columns[None, :], mask=mask, other=0.0))
    sums = dot((token[:, None] == again[None, :]).to(tl.float32), grad)
    starts = (at % CHUNK == 0) | (token != before)
    place = at.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(sums_ptr + place, sums, mask=mask & starts[:, None])


@triton.jit
def _num_below(sorted_ptr, num_codes, bounds, steps):
    """Entries of the sorted list below each of `bounds`. steps: num_codes.bit_length(), of the binary search."""
    count = bounds * 0
    for step in range(steps):
        more = count + (1 << (steps - 1 - step))
        last = tl.load(sorted_ptr + more - 1, mask=more <= num_codes, other=0x7FFFFFFF)
        count = tl.where(last < bounds, more, count)
    return count


@triton.jit
def _semantic_id_embedding_bwd_rows_kernel(
    sums_ptr,  # [N, D] fp32 of the chunks
    sorted_ptr,  # [N] int32 tokens in ascending order
    grad_table_ptr,  # [num_tokens, D] out
    num_codes,
    width,
    column_blocks,
    steps,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    bounds = _num_below(sorted_ptr, num_codes, token + tl.arange(0, 2), steps)
    begin, end = tl.min(bounds, 0), tl.max(bounds, 0)
    total = tl.zeros([PIECES, COLUMNS], tl.float32)
    for first in range(begin // CHUNK, tl.cdiv(end, CHUNK), PIECES):
        at = tl.maximum((first + tl.arange(0, PIECES)) * CHUNK, begin)
        mask = (at < end)[:, None] & (columns < width)[None, :]
        total += tl.load(sums_ptr + at.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    grad = tl.sum(total, 0).to(grad_table_ptr.dtype.element_ty)
    tl.store(grad_table_ptr + token.to(tl.int64) * width + columns, grad, mask=columns < width)


@triton.jit
def _semantic_id_embedding_bwd_atomic_kernel(
    grad_ptr,  # [N, D]
    tokens_ptr,  # [N] int32
    grad_table_ptr,  # [num_tokens, D] fp32, zeros at first
    num_codes,
    num_tokens,
    width,
    column_blocks,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0) // column_blocks * CODES + tl.arange(0, CODES)
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens_ptr + at, mask=at < num_codes, other=num_tokens)
    mask = (token < num_tokens)[:, None] & (columns < width)[None, :]
    grad = wide(tl.load(grad_ptr + at.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0))
    tl.atomic_add(grad_table_ptr + token.to(tl.int64)[:, None] * width + columns[None, :], grad, mask=mask)


def _columns(width: int) -> int:
    return min(power_of_2(width), 128)


def _forward(codes: Tensor, table: Tensor, level_offsets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    out, tokens = _fake_forward(codes, table, level_offsets, positions)
    columns, codes_per_program = _columns(table.shape[1]), 16
    column_blocks = cdiv(table.shape[1], columns)
    if codes.numel() > 0:
        _semantic_id_embedding_fwd_kernel[(cdiv(codes.numel(), codes_per_program) * column_blocks,)](
            codes, table, level_offsets, table if positions is None else positions, out, tokens,
            codes.numel(), codes.shape[1], *table.shape, column_blocks,
            HAS_POSITIONS=positions is not None, CODES=codes_per_program, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out, tokens


def _fake_forward(
    codes: Tensor, table: Tensor, level_offsets: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    return table.new_empty(*codes.shape, table.shape[1]), codes.new_empty(codes.numel(), dtype=torch.int32)


def _backward(
    grad: Tensor,
    tokens: Tensor,
    num_tokens: int,
    table_dtype: torch.dtype,
    has_positions: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    width = grad.shape[2]
    columns = _columns(width)
    launch = _add_in_order if deterministic else _add_atomically
    grad_table = launch(grad, tokens, num_tokens, columns, cdiv(width, columns), table_dtype)
    if not has_positions:
        return grad_table, grad.new_empty(0, dtype=torch.float32)
    known = tokens.view(*grad.shape[:2], 1) < num_tokens
    return grad_table, torch.where(known, grad, 0).sum(0, dtype=torch.float32)


def _add_in_order(
    grad: Tensor, tokens: Tensor, num_tokens: int, columns: int, column_blocks: int, dtype: torch.dtype
) -> Tensor:
    num_codes, width = len(tokens), grad.shape[2]
    ascending, order = tokens.sort(stable=True)
    sums = grad.new_empty(num_codes, width, dtype=torch.float32)
    grad_table = grad.new_empty(num_tokens, width, dtype=dtype)
    _semantic_id_embedding_bwd_chunks_kernel[(cdiv(num_codes, _CHUNK) * column_blocks,)](
        grad, ascending, order, sums, num_codes, num_tokens, width, column_blocks,
        CHUNK=_CHUNK, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    _semantic_id_embedding_bwd_rows_kernel[(num_tokens * column_blocks,)](
        sums, ascending, grad_table, num_codes, width, column_blocks, num_codes.bit_length(),
        CHUNK=_CHUNK, PIECES=_PIECES, COLUMNS=columns, num_warps=2,
    )  # fmt: skip
    return grad_table


def _add_atomically(
    grad: Tensor, tokens: Tensor, num_tokens: int, columns: int, column_blocks: int, dtype: torch.dtype
) -> Tensor:
    grad_table = grad.new_zeros(num_tokens, grad.shape[2], dtype=torch.float32)
    _semantic_id_embedding_bwd_atomic_kernel[(cdiv(len(tokens), _CHUNK) * column_blocks,)](
        grad, tokens, grad_table, len(tokens), num_tokens, grad.shape[2], column_blocks,
        CODES=_CHUNK, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return grad_table.to(dtype)


def _fake_backward(
    grad: Tensor,
    tokens: Tensor,
    num_tokens: int,
    table_dtype: torch.dtype,
    has_positions: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    grad_positions = grad.new_empty(grad.shape[1:] if has_positions else 0, dtype=torch.float32)
    return grad.new_empty(num_tokens, grad.shape[2], dtype=table_dtype), grad_positions


FORWARD = define(
    "semantic_id_embedding(Tensor codes, Tensor table, Tensor level_offsets, Tensor? positions) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
BACKWARD = define(
    "semantic_id_embedding_backward(Tensor grad, Tensor tokens, int num_tokens, ScalarType table_dtype, "
    "bool has_positions, bool deterministic) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _SemanticIdEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        table: Tensor,
        level_offsets: Tensor,
        positions: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        out, tokens = FORWARD(codes, table, level_offsets, positions)
        ctx.save_for_backward(tokens)
        ctx.num_tokens, ctx.table_dtype = len(table), table.dtype
        ctx.positions_dtype, ctx.deterministic = None if positions is None else positions.dtype, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        has_positions = ctx.positions_dtype is not None
        grad_table, grad_positions = BACKWARD(
            grad.contiguous(), tokens, ctx.num_tokens, ctx.table_dtype, has_positions, ctx.deterministic
        )
        return None, grad_table, None, grad_positions.to(ctx.positions_dtype) if has_positions else None, None


def semantic_id_embedding(
    codes: Tensor, table: Tensor, level_offsets: Tensor, positions: Tensor | None, deterministic: bool
) -> Tensor:
    """See `ops.semantic_id_embedding`."""
    positions = None if positions is None else positions.contiguous()
    return _SemanticIdEmbedding.apply(
        codes.contiguous(), table.contiguous(), level_offsets.contiguous(), positions, deterministic
    )
