"""The ways in which a gradient passes the choice of a code."""

import enum

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-6
"""Norms below this have no direction that could be rotated."""

_NEARLY_OPPOSITE = 1e-3
"""Length of the sum of two unit vectors below which the plane of their rotation is lost in rounding."""


class QuantizeMode(enum.Enum):
    """How a gradient passes the choice of a code.

    STRAIGHT_THROUGH copies it from the sum of the codes to the encoder output (van den Oord et al. 2017).
    GUMBEL_SOFTMAX replaces the choice, in training, by a softmax over noisy negative distances (Jang et al. 2017).
    ROTATION_TRICK carries it through the rotation and rescaling of the encoder output onto the sum of the codes
    (Fifty et al. 2024, arXiv 2410.06424, section 4.2).
    """

    STRAIGHT_THROUGH = "straight_through"
    GUMBEL_SOFTMAX = "gumbel_softmax"
    ROTATION_TRICK = "rotation_trick"


def pass_gradient(mode: QuantizeMode, x: Tensor, target: Tensor) -> Tensor:
    """The value of target [B, D], with the gradient that a mode gives x [B, D].

    A soft choice has a gradient of its own, so GUMBEL_SOFTMAX leaves the target as it is.
    """
    if mode is QuantizeMode.STRAIGHT_THROUGH:
        return straight_through(x, target)
    if mode is QuantizeMode.ROTATION_TRICK:
        return rotation_trick(x, target)
    return target


def straight_through(x: Tensor, target: Tensor) -> Tensor:
    """The value of target with the gradient of x; [B, D] both."""
    return x + (target - x).detach()


def rotation_trick(x: Tensor, target: Tensor) -> Tensor:
    """The value of target, reached from x by a rotation and a rescaling that carry no gradient themselves.

    With unit vectors x^ and t^, r the unit vector of x^ + t^, and s = |target| / |x|, the gradient of the
    result with respect to x is s (I - 2 r r^T + 2 t^ x^^T) (Fifty et al. 2024, section 4.2). Rows for which
    that is not defined (a zero norm, or opposite directions) take the straight-through gradient.

    Args:
        x: [B, D].
        target: [B, D]; receives no gradient.

    Returns:
        [B, D].
    """
    start, end = x.detach(), target.detach()
    start_norm, end_norm = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    start_unit, end_unit = start / start_norm.clamp(min=_SMALL), end / end_norm.clamp(min=_SMALL)
    middle = start_unit + end_unit
    middle_norm = middle.norm(dim=-1, keepdim=True)
    defined = (start_norm > _SMALL) & (end_norm > _SMALL) & (middle_norm > _NEARLY_OPPOSITE)
    middle = middle / middle_norm.clamp(min=_NEARLY_OPPOSITE)

    along_middle = (x * middle).sum(dim=-1, keepdim=True)
    along_start = (x * start_unit).sum(dim=-1, keepdim=True)
    rotated = x - 2 * along_middle * middle + 2 * along_start * end_unit
    moved = torch.where(defined, rotated * (end_norm / start_norm.clamp(min=_SMALL)), x)
    return straight_through(moved, end)


def gumbel_softmax_choice(residual: Tensor, codebook: Tensor, temperature: float | Tensor) -> Tensor:
    """Weights of the codes in a relaxed sample of a noisy choice (Jang et al. 2017, eq. 2).

    A code's logit is its negative squared distance over the temperature, distances being measured in units of the
    batch's mean distance to the nearest code: the same temperature means the same noise for every level and every
    scale of features, and towards 0 the choice becomes the nearest code, the one that evaluation takes.

    Args:
        residual: [B, D].
        codebook: [K, D].
        temperature: positive. Gumbel noise of unit scale is drawn from torch's generator.

    Returns:
        [B, K], each row of sum 1, with gradient to both.
    """
    cross = residual @ codebook.T
    distance = residual.square().sum(dim=1, keepdim=True) - 2 * cross + codebook.square().sum(dim=1)
    unit = distance.detach().amin(dim=1).mean().clamp(min=torch.finfo(distance.dtype).tiny)
    return F.gumbel_softmax(-distance / (temperature * unit), tau=1.0, dim=-1)
