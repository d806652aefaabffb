"""How many rows each code has, and their sum: the statistics of a k-means step."""

import torch
from torch import Tensor


@torch.no_grad()
def codebook_stats(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows assigned to every code.

    Accumulates in fp32 whatever the dtype of x (in fp64 when x is fp64), without gradient.

    Args:
        x: [B, D] floating point.
        codes: [B] int64 in [0, num_codes).
        num_codes: K.

    Returns:
        counts [K] int64 and sums [K, D]; both are zero for a code without rows.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = codes.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(codes))
    sums = torch.zeros(num_codes, x.shape[1], dtype=dtype, device=x.device).index_add_(0, codes, x.to(dtype))
    return counts, sums
