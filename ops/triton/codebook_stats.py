"""Counts and sums of the rows of every code, without atomics: products with one-hot rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.library import define
from ops.triton.parts import cdiv, dot, power_of_2

_PROGRAMS = 264
"""To aim at: two for every processor of an H100."""


@triton.jit
def _codebook_stats_fwd_kernel(
    x_ptr,  # [B, D]
    codes_ptr,  # [B] int64
    counts_ptr,  # [slots, K] int32 out, of each slot's rows
    sums_ptr,  # [slots, K, D] fp32 out, of each slot's rows
    num_rows,
    num_codes,
    width,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    slot = tl.program_id(0)
    numbers = tl.program_id(1) * CODES + tl.arange(0, CODES)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    counts = tl.zeros([CODES], tl.int32)
    sums = tl.zeros([CODES, WIDTH], tl.float32)
    for first in range(slot * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        codes = tl.load(codes_ptr + rows, mask=rows < num_rows, other=-1)
        chosen = codes[None, :] == numbers[:, None]
        counts += tl.sum(chosen.to(tl.int32), 1)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        x = tl.load(x_ptr + at, mask=(rows < num_rows)[:, None] & (columns < width)[None, :], other=0.0)
        sums += dot(chosen.to(tl.float32).to(x.dtype), x)
    out = slot.to(tl.int64) * num_codes + numbers
    tl.store(counts_ptr + out, counts, mask=(numbers < num_codes) & (tl.program_id(2) == 0))
    mask = (numbers < num_codes)[:, None] & (columns < width)[None, :]
    tl.store(sums_ptr + out[:, None] * width + columns[None, :], sums, mask=mask)


def _blocks(num_codes: int, width: int) -> dict[str, int]:
    codes, columns = min(64, power_of_2(num_codes)), min(64, power_of_2(width))
    return {"ROWS": 32, "CODES": codes, "WIDTH": columns, "num_warps": 4, "num_stages": 2}


def _forward(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts, sums = _fake_forward(x, codes, num_codes)
    num_rows, width = x.shape
    blocks = _blocks(num_codes, width)
    grid = (len(counts), cdiv(num_codes, blocks["CODES"]), cdiv(width, blocks["WIDTH"]))
    _codebook_stats_fwd_kernel[grid](x, codes, counts, sums, num_rows, num_codes, width, **blocks)
    return counts, sums


def _fake_forward(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    blocks = _blocks(num_codes, width)
    tiles = cdiv(num_codes, blocks["CODES"]) * cdiv(width, blocks["WIDTH"])
    num_slots = min(cdiv(_PROGRAMS, tiles), cdiv(num_rows, blocks["ROWS"]))
    counts = x.new_empty(num_slots, num_codes, dtype=torch.int32)
    return counts, x.new_empty(num_slots, num_codes, width, dtype=torch.float32)


FORWARD = define(
    "codebook_stats(Tensor x, Tensor codes, int num_codes) -> (Tensor, Tensor)", _forward, _fake_forward
)  # fmt: skip


def codebook_stats(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See `ops.codebook_stats`."""
    counts, sums = FORWARD(x.detach().contiguous(), codes.contiguous(), num_codes)
    return counts.sum(0), sums.sum(0)
