"""What attention over packed rows shares: tiles of one head, their sizes, and slots for the gradient of a bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton.parts import cdiv, power_of_2

MAX_BLOCK = 64
"""Queries and keys per tile at most."""

GRANULE = 16
"""Longest lengths are rounded up to multiples of it, so that few bias tables and kernel variants arise."""

ROWS_PER_SLOT = 4
"""Rows of the batch that one program of the bias gradient sums."""

MAX_PARTIALS = 1 << 22
"""Partial sums of the bias gradient at most, 16 MiB."""


@triton.jit
def bounds_of_row(offsets_ptr, row, most):
    """First token and number of tokens of a row, which has at most `most`."""
    begin = tl.load(offsets_ptr + row)
    return begin, tl.minimum(tl.load(offsets_ptr + row + 1) - begin, most)


@triton.jit
def _tile_at(begin, places, count, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of one head at some places of a row, [places, WIDTH], and which of them exist."""
    columns = tl.arange(0, WIDTH)
    at = (begin + places).to(tl.int64)[:, None] * stride + columns[None, :]
    return at, (places < count)[:, None] & (columns < HEAD_DIM)[None, :]


@triton.jit
def load_tile(ptr, begin, places, count, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[places, WIDTH] of one head; zeros beyond the row and the head."""
    at, exists = _tile_at(begin, places, count, stride, HEAD_DIM, WIDTH)
    return tl.load(ptr + at, mask=exists, other=0.0)


@triton.jit
def store_tile(ptr, tile, begin, places, count, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `load_tile`."""
    at, exists = _tile_at(begin, places, count, stride, HEAD_DIM, WIDTH)
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=exists)


def tile_sizes(max_q: int, max_k: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles as long as the longest rows, up to what registers hold of them, and the warps for them."""
    narrow, width = dtype != torch.float32, power_of_2(head_dim)
    most = max(16, min(MAX_BLOCK if narrow else MAX_BLOCK // 2, 8192 // (width * dtype.itemsize)))
    block_q, block_k = min(most, power_of_2(max_q)), min(most, power_of_2(max_k))
    large = max(block_q, block_k) * max(min(block_q, block_k), width) > 1024
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": (2 if narrow else 4) * (2 if large else 1)}


def rounded(longest: int) -> int:
    """A longest length as kernels see it."""
    return cdiv(longest, GRANULE) * GRANULE


def slots_for(num_rows: int, size: int) -> int:
    """Slots of `size` partial sums each for the gradient of a bias."""
    return max(1, min(cdiv(num_rows, ROWS_PER_SLOT), MAX_PARTIALS // size))


def with_dense_heads(x: Tensor) -> Tensor:
    """[T, ..., H, D] whose heads lie behind each other; tokens and slots may be apart."""
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()
