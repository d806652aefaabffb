"""What codes keep of the features, and where the rest is lost: in the autoencoder or level by level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import InputError
from modules.rqvae import RqVae

_BLOCK_ROWS = 4096
_ROUNDING = 1e-12
"""Share of the squared length below which a variance is what fp32 makes of equal rows."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Reconstruction:
    """Squared errors, summed over the dimensions of an item; means over the items where not said otherwise.

    Attributes:
        errors: [N] fp32 on the CPU, of every item's features decoded from its codes.
        variance: squared distance of the features from their mean, the error of ids that know nothing.
        unquantized: error of the autoencoder alone, the latent taken as it is; codes seldom do better.
        latent_variance: squared distance of the latents from their mean.
        latent_residual: at place d what is left of the latents after d + 1 levels.
    """

    errors: Tensor
    variance: float
    unquantized: float
    latent_variance: float
    latent_residual: tuple[float, ...]

    @property
    def error(self) -> float:
        """Mean over the items."""
        return float(self.errors.double().mean())

    @property
    def explained(self) -> float | None:
        """Share of the features' variance that the codes keep, at most 1; None where the features do not vary."""
        return _explained(self.error, self.variance)

    @property
    def explained_unquantized(self) -> float | None:
        """The same of the autoencoder alone."""
        return _explained(self.unquantized, self.variance)

    @property
    def latent_explained(self) -> tuple[float | None, ...]:
        """Share of the latents' variance that the first d + 1 levels keep."""
        return tuple(_explained(left, self.latent_variance) for left in self.latent_residual)


@torch.no_grad()
def reconstruct(rqvae: RqVae, features: Tensor, codes: Tensor) -> Reconstruction:
    """Decode codes and compare with the features, in blocks on the RQ-VAE's device.

    Categorical inputs, whose predictions are logits, are compared as probabilities.

    Args:
        rqvae: in evaluation mode.
        features: [N, input_dim], N at least 1, any float dtype.
        codes: [N, L] int64 of the same items, without dedup code.

    Raises:
        InputError: if the lengths differ, or the features are of another width.
    """
    if len(features) != len(codes) or len(codes) == 0:
        raise InputError(f"reconstruct expected codes of {len(features)} >= 1 items, got {list(codes.shape)}.")
    codebooks = rqvae.codebooks()
    device = codebooks[0].device
    sums, errors = _Sums(len(codebooks)), []
    for begin in range(0, len(features), _BLOCK_ROWS):
        x = features[begin : begin + _BLOCK_ROWS].to(device).float()
        block_codes = codes[begin : begin + _BLOCK_ROWS].to(device)
        latent = rqvae.encode(x)
        residual = latent
        for level, codebook in enumerate(codebooks):
            residual = residual - codebook[block_codes[:, level]]
            sums.latent_residual[level] += float(residual.double().square().sum())
        errors.append(_errors(rqvae, latent - residual, x).cpu())
        sums.unquantized += float(_errors(rqvae, latent, x).double().sum())
        sums.add("features", x)
        sums.add("latents", latent)
    count = len(features)
    return Reconstruction(
        errors=torch.cat(errors),
        variance=sums.variance("features", count),
        unquantized=sums.unquantized / count,
        latent_variance=sums.variance("latents", count),
        latent_residual=tuple(total / count for total in sums.latent_residual),
    )


class _Sums:
    """Running sums over blocks, in fp64."""

    def __init__(self, num_levels: int) -> None:
        self.unquantized = 0.0
        self.latent_residual = [0.0] * num_levels
        self._first: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._lengths: dict[str, float] = {}

    def add(self, name: str, rows: Tensor) -> None:
        # Differences from a first row: the variance of nearly equal rows would vanish between large squares.
        rows = rows.double()
        shifted = rows - self._first.setdefault(name, rows[0])
        self._sums[name] = self._sums.get(name, 0) + shifted.sum(dim=0)
        self._squares[name] = self._squares.get(name, 0.0) + float(shifted.square().sum())
        self._lengths[name] = self._lengths.get(name, 0.0) + float(rows.square().sum())

    def variance(self, name: str, count: int) -> float:
        mean = self._sums[name] / count
        variance = self._squares[name] / count - float(mean.square().sum())
        return variance if variance > _ROUNDING * self._lengths[name] / count else 0.0


def _errors(rqvae: RqVae, embedding: Tensor, x: Tensor) -> Tensor:
    """[B] squared errors of what is decoded."""
    prediction = rqvae.decode(embedding).float()
    split = rqvae.config.input_dim - rqvae.config.num_categorical
    prediction = torch.cat([prediction[:, :split], prediction[:, split:].sigmoid()], dim=1)
    return (prediction - x).square().sum(dim=1)


def _explained(error: float, variance: float) -> float | None:
    return 1.0 - error / variance if variance > 0 else None
