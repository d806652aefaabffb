"""Residual k-means: the codebooks of a tokenizer without training, each of what the levels before it left over."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.schemas import InputError
from modules.feature_rows import FeatureMatrix, RowBlocks
from modules.minibatch_kmeans import KmeansEffort, fit_centroids
from ops import residual_quantize


@torch.no_grad()
def residual_kmeans(
    features: FeatureMatrix,
    codebook_sizes: Sequence[int],
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    effort: KmeansEffort | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    item_keys: Sequence[str] | None = None,
) -> list[Tensor]:
    """Codebooks level by level: k-means of the rows, then of their distances from the nearest code, and so on.

    Up to effort.memory_rows rows are read into memory. Of more, every level reads the matrix anew in slices, and
    memory does not grow with its length.

    Args:
        features: [N, D_in], N at least 1.
        codebook_sizes: K_l of every level, nearest by squared L2 distance.
        transform: applied to blocks of rows, [B, D_in] fp32 -> [B, D], before they are quantized; an encoder.
        effort: by default KmeansEffort().
        seed: of all that is drawn; the same features and seed give the same codebooks.
        device: where to compute.
        item_keys: of the rows, to be named in errors.

    Returns:
        One [K_l, D] float32 per level, on the device.

    Raises:
        InputError: if there are no rows or no levels, a size is below 1, or a row holds NaN or infinity (it is named).
    """
    if len(codebook_sizes) == 0 or min(codebook_sizes) < 1:
        raise InputError(f"residual_kmeans expected codebook_sizes of at least 1 per level, got {codebook_sizes}.")
    effort = effort or KmeansEffort()
    rows = RowBlocks(features, block_rows=effort.batch_rows, device=device, transform=transform, item_keys=item_keys)
    sample = rows.sample(effort.sample_rows(rows.num_rows, max(codebook_sizes)), seed)
    codebooks: list[Tensor] = []
    for level, size in enumerate(codebook_sizes):
        left_over = rows.through(_residual_of(codebooks)) if codebooks else rows
        codebooks.append(fit_centroids(left_over, sample, size, effort=effort, seed=seed + level))
        sample = residual_quantize(sample, codebooks[-1:])[1]
    return codebooks


def _residual_of(codebooks: list[Tensor]) -> Callable[[Tensor], Tensor]:
    levels = list(codebooks)
    return lambda rows: residual_quantize(rows, levels)[1]
