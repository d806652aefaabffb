"""Losses of the RQ-VAE, one value per item."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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


def residual_quantize_loss(latent: Tensor, embeddings: Tensor, commitment_weight: float) -> Tensor:
    """The sum of `quantize_loss` over all levels, where each level quantizes what those before it left over.

    A level's code is detached where it is subtracted, so every level's commitment pulls at the latent with full weight.

    Args:
        latent: [B, D], what the first level had to quantize.
        embeddings: [B, L, D], the codes chosen, level by level.
        commitment_weight: beta.

    Returns:
        [B].
    """
    return _ResidualQuantizeLoss.apply(latent, embeddings, commitment_weight)


class _ResidualQuantizeLoss(Function):
    """Residual less code is the same tensor in both terms of every level, so one subtraction serves all."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, embeddings: Tensor, commitment_weight: float) -> Tensor:
        left = latent[:, None] - embeddings.cumsum(dim=1)
        ctx.save_for_backward(left)
        ctx.commitment_weight = commitment_weight
        return (1 + commitment_weight) * left.square().sum(dim=(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (left,) = ctx.saved_tensors
        pull = 2 * grad[:, None, None] * left
        return ctx.commitment_weight * pull.sum(dim=1), -pull, None
