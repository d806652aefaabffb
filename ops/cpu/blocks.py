"""Blocks of rows small enough that what an op computes for them stays in a processor's cache."""

from torch import Tensor


def row_blocks(x: Tensor, num_rows: int) -> list[slice]:
    """Slices of at most `num_rows` rows that cover `x`; one slice on any other device than a CPU."""
    step = num_rows if x.device.type == "cpu" else max(len(x), 1)
    return [slice(begin, begin + step) for begin in range(0, len(x), step)]
