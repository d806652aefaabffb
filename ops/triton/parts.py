"""Parts that kernels share: products, dropout masks, block sizes."""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def cdiv(x: int, y: int) -> int:
    """Blocks of y that cover x, at least one: a launch grid must not be empty."""
    return max(1, (x + y - 1) // y)


def power_of_2(x: int, *, least: int = 16) -> int:
    """The power of two that is not below x or `least`; products need blocks of 16."""
    return max(least, triton.next_power_of_2(x))


@triton.jit
def dot(a, b):
    """A @ b with fp32 sums; fp32 operands multiply exactly, without tf32.

    Triton's interpreter keeps bf16 as raw bits and would multiply those, so there the operands are widened first.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def wide(x):
    """X in fp32; for loads before elementwise arithmetic, which accumulates in fp32."""
    return x.to(tl.float32)


@triton.jit
def keep_mask(seed_ptr, rows, first_column, plane, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] dropout mask, true where an element stays; `ops.reference.philox.seeded_keep` is its twin.

    seed_ptr: one int64. rows: [ROWS] row numbers. first_column: a multiple of 8, as COLUMNS is. plane: mask number.
    threshold: dropout probability times 65536, rounded. One Philox call gives eight elements 16 bits each.
    """
    groups: tl.constexpr = COLUMNS // 8
    seed = tl.load(seed_ptr)
    zeros = tl.zeros([ROWS, groups], tl.uint32)
    c0 = zeros + (first_column // 8 + tl.arange(0, groups)).to(tl.uint32)[None, :]
    c1 = zeros + rows.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, (zeros + plane).to(tl.uint32), zeros)
    # Each join adds a last axis of two, whose index becomes the element's next higher bit when it is flattened.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    numbers = tl.join(low, high)  # [ROWS, groups, 2 (w: 2s), 2 (w: 1s), 2 (half)]
    return tl.reshape(numbers.to(tl.int32), [ROWS, COLUMNS]) >= threshold


def threshold_of(dropout_p: float) -> int:
    """`keep_mask`'s threshold."""
    return round(dropout_p * 65536)
