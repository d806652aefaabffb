"""One level of the residual quantizer, and the ways in which its gradient reaches the encoder."""

import enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.kmeans import kmeans
from ops import residual_quantize

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


class Quantized(NamedTuple):
    """What a level made of its residuals: embeddings [B, D] with gradient to the codebook, codes [B] int64."""

    embedding: Tensor
    codes: Tensor


class Quantizer(nn.Module):
    """A codebook and the choice of one of its codes per row.

    Args:
        codebook_size: number of codes K.
        dim: width D.
        mode: decides whether training chooses softly (GUMBEL_SOFTMAX) or takes the nearest code.
        sim_vq: freeze the codebook and learn a linear map of it (arXiv 2411.02038), so that every code moves
            with every step, chosen or not.
        normalize: scale the codes to unit length; for rows of unit length the choice is then by cosine.
    """

    def __init__(
        self, codebook_size: int, dim: int, *, mode: QuantizeMode, sim_vq: bool = False, normalize: bool = False
    ) -> None:
        super().__init__()
        self.mode = mode
        self.normalize = normalize
        self.weight = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5, requires_grad=not sim_vq)
        self.projection = nn.Linear(dim, dim, bias=False) if sim_vq else None

    def codebook(self) -> Tensor:
        """The codes as they are compared with rows: [K, D], mapped and normalised as configured."""
        codes = self.weight if self.projection is None else self.projection(self.weight)
        return F.normalize(codes, dim=-1) if self.normalize else codes

    def forward(self, residual: Tensor, temperature: float | Tensor = 1.0) -> Quantized:
        """Choose a code for every row; softly in training under GUMBEL_SOFTMAX, else the nearest.

        Args:
            residual: [B, D] fp32 or fp64.
            temperature: of the Gumbel softmax; ignored in the other modes and in evaluation.

        Returns:
            The embeddings, and the nearest code of every row whatever the mode.
        """
        codebook = self.codebook()
        codes = residual_quantize(residual.detach(), [codebook.detach()])[0][:, 0]
        if self.training and self.mode is QuantizeMode.GUMBEL_SOFTMAX:
            return Quantized(gumbel_softmax_embedding(residual, codebook, temperature), codes)
        return Quantized(F.embedding(codes, codebook), codes)

    @torch.no_grad()
    def initialize_(self, residual: Tensor, *, num_iterations: int, seed: int) -> None:
        """Set the codes to the k-means centroids of [N, D] residuals."""
        centroids = kmeans(residual, len(self.weight), num_iterations=num_iterations, seed=seed)
        self.weight.copy_(centroids)
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)


def gumbel_softmax_embedding(residual: Tensor, codebook: Tensor, temperature: float | Tensor) -> Tensor:
    """Average of the codes under a relaxed sample of a noisy choice (Jang et al. 2017, eq. 2).

    A code's logit is its negative squared distance over the temperature, distances being measured in units of the
    batch's mean distance to the nearest code: the same temperature means the same noise for every level and every
    scale of features, and towards 0 the choice becomes the nearest code, the one that evaluation takes.

    Args:
        residual: [B, D].
        codebook: [K, D].
        temperature: positive. Gumbel noise of unit scale is drawn from torch's generator.

    Returns:
        [B, D], with gradient to both.
    """
    cross = residual @ codebook.T
    distance = residual.square().sum(dim=1, keepdim=True) - 2 * cross + codebook.square().sum(dim=1)
    unit = distance.detach().amin(dim=1).mean().clamp(min=torch.finfo(distance.dtype).tiny)
    return F.gumbel_softmax(-distance / (temperature * unit), tau=1.0, dim=-1) @ codebook


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
