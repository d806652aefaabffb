"""Parts that kernels over packed rows share: rows of tokens, zeros behind the last row, copies of bits, block sizes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.parts import power_of_2

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def row_of_token(offsets_ptr, num_rows, tokens, STEPS: tl.constexpr):
    """Row of every token, num_rows behind the last boundary; `ops.reference.jagged_to_padded.row_of_token` is its twin.

    offsets_ptr: [num_rows + 1] int32. tokens: block of int32. STEPS: num_rows.bit_length(), of the binary search.
    """
    row = tokens * 0
    for step in tl.static_range(STEPS):
        later = row + (1 << (STEPS - 1 - step))
        begin = tl.load(offsets_ptr + later, mask=later <= num_rows, other=0x7FFFFFFF)
        row = tl.where(begin <= tokens, later, row)
    return row


@triton.jit
def clear_tail(ptr, offsets_ptr, num_rows, num_tokens, stride, BLOCK: tl.constexpr):
    """Zeros for the tokens behind the last row, [num_tokens, stride] lying densely: every program its share."""
    width = tl.num_programs(0).to(tl.int64)
    program = tl.program_id(1) * width + tl.program_id(0)
    first = tl.load(offsets_ptr + num_rows).to(tl.int64) * stride + program * BLOCK
    last = tl.cast(num_tokens, tl.int64) * stride
    for begin in range(first, last, width * tl.num_programs(1) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        tl.store(ptr + at, tl.zeros([BLOCK], tl.float32).to(ptr.dtype.element_ty), mask=at < last)


def as_bits(x: Tensor) -> Tensor:
    """The same memory as integers: kernels that only copy need no dtype, and no NaN is changed on the way."""
    return x.view(_BITS[x.dtype.itemsize])


def copy_blocks(width: int) -> dict[str, int]:
    """Blocks over packed rows of any width; small, since a batch has some 10,000 tokens for a hundred processors."""
    columns = power_of_2(min(width, 256), least=1)
    return {"ROWS": min(256, 2048 // columns), "WIDTH": columns, "num_warps": 4}


def tile_of_rows(max_len: int, width: int) -> dict[str, int]:
    """Tiles for a program that walks along one row of at most `max_len` tokens."""
    columns = power_of_2(min(width, 128), least=1)
    return {"ROWS": min(power_of_2(min(max_len, 2048)), 2048 // columns), "WIDTH": columns, "num_warps": 4}
