"""Losses of the RQ-VAE, one value per item."""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(prediction: Tensor, x: Tensor, *, num_categorical: int = 0) -> Tensor:
    """How far a reconstruction is from the features, summed over the dimensions, in fp32 or better.

    Squared error for the continuous inputs; binary cross-entropy for the trailing categorical ones, whose
    predictions are logits.

    Args:
        prediction: [B, D].
        x: [B, D]; the last num_categorical columns lie in [0, 1].
        num_categorical: number of trailing categorical inputs.

    Returns:
        [B].
    """
    if x.dtype.itemsize < 4:
        x = x.float()
    prediction = prediction.to(x.dtype)
    split = x.shape[-1] - num_categorical
    loss = (prediction[:, :split] - x[:, :split]).square().sum(dim=-1)
    if num_categorical:
        loss = loss + F.binary_cross_entropy_with_logits(prediction[:, split:], x[:, split:], reduction="none").sum(
            dim=-1
        )
    return loss


def quantize_loss(residual: Tensor, embedding: Tensor, commitment_weight: float) -> Tensor:
    """||sg(r) - e||^2 + beta ||r - sg(e)||^2 (van den Oord et al. 2017, eq. 3; sg stops the gradient).

    Args:
        residual: [B, D] r, what the level had to quantize.
        embedding: [B, D] e, the code chosen for it.
        commitment_weight: beta.

    Returns:
        [B].
    """
    codebook = (residual.detach() - embedding).square().sum(dim=-1)
    commitment = (residual - embedding.detach()).square().sum(dim=-1)
    return codebook + commitment_weight * commitment
