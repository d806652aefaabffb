"""An RQ-VAE as it is usually written in PyTorch, level by level: the baseline of the RQ-VAE benchmarks."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.rqvae import RqVae


class PlainRqVae(nn.Module):
    """Computes what an `RqVae` with straight-through gradients computes, on a copy of its weights."""

    def __init__(self, model: RqVae) -> None:
        super().__init__()
        config = model.config
        dims = [config.input_dim, *config.hidden_dims, config.embed_dim]
        self.encoder, self.decoder = _mlp(dims), _mlp(dims[::-1])
        self.codebooks = nn.ParameterList(torch.empty(size, config.embed_dim) for size in config.codebook_sizes)
        self.beta = config.commitment_weight
        with torch.no_grad():
            for own, other in zip(self.parameters(), self.counterparts(model), strict=True):
                own.copy_(other)
        self.to(next(model.parameters()).device)

    @staticmethod
    def counterparts(model: RqVae) -> list[nn.Parameter]:
        """The parameters of the model in the order of this one's."""
        weights = dict(model.named_parameters())
        mlps = [weights[name] for part in ("encoder", "decoder") for name in weights if name.startswith(part)]
        return mlps + [weights[name] for name in weights if name.startswith("quantizers")]

    def forward(self, x: Tensor, given_codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and the codes [B, L]; given codes are taken instead of the nearest."""
        latent = residual = self.encoder(x).float()
        total, quantization, codes = torch.zeros_like(latent), torch.zeros_like(latent[:, 0]), []
        for level, codebook in enumerate(self.codebooks):
            nearest = nearest_code(residual.detach(), codebook) if given_codes is None else given_codes[:, level]
            embedding = F.embedding(nearest, codebook)
            quantization = quantization + F.mse_loss(embedding, residual.detach(), reduction="none").sum(dim=-1)
            commitment = F.mse_loss(residual, embedding.detach(), reduction="none").sum(dim=-1)
            quantization = quantization + self.beta * commitment
            total = total + embedding
            residual = residual - embedding.detach()
            codes.append(nearest)
        prediction = self.decoder(latent + (total - latent).detach()).float()
        reconstruction = (prediction - x.float()).square().sum(dim=-1)
        return (reconstruction + quantization).mean(), torch.stack(codes, dim=1)

    @torch.no_grad()
    def semantic_ids(self, x: Tensor) -> Tensor:
        """Nearest codes [B, L]."""
        residual, codes = self.encoder(x).float(), []
        for codebook in self.codebooks:
            codes.append(torch.cdist(residual, codebook).argmin(dim=1))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1)


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The usual three terms of the squared distance."""
    distance = x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1) - 2 * x @ codebook.T
    return distance.argmin(dim=1)


def _mlp(dims: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(dims):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
