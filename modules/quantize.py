"""One level of the residual quantizer: a codebook, the choice of one of its codes, and what keeps codes alive."""

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.collective import chosen_rows, num_processes, of_first_process, own_rows, rows_of_all, sum_over_processes
from modules.estimators import QuantizeMode, gumbel_softmax_choice
from modules.kmeans import kmeans
from modules.sinkhorn import sinkhorn_codes
from ops import codebook_stats, residual_quantize

_FADED = 1e-5
"""A code of an EMA codebook whose moving count of rows is smaller keeps its place, so that no mean divides by zero."""


class Distance(enum.Enum):
    """What the nearest code is nearest by.

    L2 is the Euclidean distance. COSINE compares directions alone; what is added up is the code itself.
    """

    L2 = "l2"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of a residual quantizer; `RqVaeConfig` says what the fields mean."""

    size: int
    mode: QuantizeMode
    sim_vq: bool = False
    distance: Distance = Distance.L2
    sinkhorn_epsilon: float = 0.0
    ema_decay: float = 0.0
    restart_after: int = 0
    normalize: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether training chooses the nearest code by L2 and keeps no account of it."""
        soft = self.mode is QuantizeMode.GUMBEL_SOFTMAX
        keeps_account = self.ema_decay > 0 or self.restart_after > 0
        return not (soft or keeps_account or self.sinkhorn_epsilon > 0 or self.distance is not Distance.L2)


class Quantized(NamedTuple):
    """What a level made of its residuals: embeddings [B, D] with gradient to the codebook, codes [B] int64."""

    embedding: Tensor
    codes: Tensor


class Quantizer(nn.Module):
    """A codebook and the choice of one of its codes per row.

    The codes learn by gradient; with `sim_vq` they are frozen and a linear map of them learns (arXiv 2411.02038), so
    that every code moves with every step, chosen or not; with `ema_decay` each is the moving average of the rows that
    chose it (van den Oord et al. 2017, appendix A.1). Buffers hold what resuming needs.

    Several processes that train together, each on B of P * B rows, do what one does on all of them: averages, balance
    and restarts are those of all rows. Only a soft choice differs: each process draws its own noise, and measures
    distances in units of its own rows' mean (see `gumbel_softmax_choice`).

    Args:
        dim: width D.
        config: of the level.
    """

    ema_counts: Tensor
    ema_sums: Tensor
    idle_steps: Tensor

    def __init__(self, dim: int, config: LevelConfig) -> None:
        super().__init__()
        self.config = config
        learns = not config.sim_vq and config.ema_decay == 0
        self.weight = nn.Parameter(torch.randn(config.size, dim) * dim**-0.5, requires_grad=learns)
        self.projection = nn.Linear(dim, dim, bias=False) if config.sim_vq else None
        if config.ema_decay > 0:
            self.register_buffer("ema_counts", torch.ones(config.size))
            self.register_buffer("ema_sums", self.weight.detach().clone())
        if config.restart_after > 0:
            self.register_buffer("idle_steps", torch.zeros(config.size, dtype=torch.int64))

    def codebook(self) -> Tensor:
        """The codes as they are added up: [K, D], mapped and normalised as configured."""
        codes = self.weight if self.projection is None else self.projection(self.weight)
        return F.normalize(codes, dim=-1) if self.config.normalize else codes

    def forward(self, residual: Tensor, temperature: float | Tensor = 1.0) -> Quantized:
        """Choose a code for every row: in evaluation the nearest; in training as configured.

        Args:
            residual: [B, D] fp32 or fp64.
            temperature: of the Gumbel softmax; ignored in the other modes and in evaluation.

        Returns:
            The embeddings, and the codes; those of a soft choice are the nearest.
        """
        if self.training and self.config.restart_after > 0:
            self._restart_(residual.detach())
        codes = self._balanced(residual.detach()) if self._balances() else self.nearest(residual)
        codebook = self.codebook()
        if self.training and self.config.mode is QuantizeMode.GUMBEL_SOFTMAX:
            choice = gumbel_softmax_choice(self.compared(residual), self.compared(codebook), temperature)
            embedding = choice @ codebook
        else:
            embedding = F.embedding(codes, codebook)
        if self.training:
            self._observe_(residual.detach(), codes)
        return Quantized(embedding, codes)

    def compared(self, rows: Tensor) -> Tensor:
        """Residuals or codes [B, D] as the choice compares them: of unit length under the cosine."""
        return F.normalize(rows, dim=-1) if self.config.distance is Distance.COSINE else rows

    def compared_codes(self) -> Tensor:
        """The codes [K, D] as the choice compares them; without gradient."""
        return self.compared(self.codebook().detach())

    @torch.no_grad()
    def nearest(self, residual: Tensor) -> Tensor:
        """Code [B] int64 that is nearest to each of [B, D] residuals; the lowest of equally near ones."""
        return residual_quantize(residual, [self.compared_codes()])[0][:, 0]

    @torch.no_grad()
    def costs(self, residual: Tensor) -> Tensor:
        """[B, K] what the choice minimises: squared distances, or the negative cosine."""
        codebook = self.compared_codes()
        if self.config.distance is Distance.COSINE:
            return -(self.compared(residual) @ codebook.T)
        cross = residual @ codebook.T
        squared = residual.square().sum(dim=1, keepdim=True) - 2 * cross + codebook.square().sum(dim=1)
        return squared.clamp(min=0)

    @torch.no_grad()
    def initialize_(self, residual: Tensor, *, seed: int, num_rounds: int = 0) -> None:
        """Set the codes to the k-means centroids of [N, D] residuals."""
        self.set_codes_(kmeans(residual, self.config.size, num_rounds=num_rounds, seed=seed))

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Set the codes to [K, D] given ones, and forget what became of the old ones."""
        self.weight.copy_(codes)
        if self.projection is not None:
            nn.init.eye_(self.projection.weight)
        if self.config.ema_decay > 0:
            self.ema_counts.fill_(1.0)
            self.ema_sums.copy_(codes)
        if self.config.restart_after > 0:
            self.idle_steps.zero_()

    def _balances(self) -> bool:
        return self.training and self.config.sinkhorn_epsilon > 0

    def _balanced(self, residual: Tensor) -> Tensor:
        return own_rows(sinkhorn_codes(self.costs(rows_of_all(residual)), self.config.sinkhorn_epsilon))

    @torch.no_grad()
    def _restart_(self, residual: Tensor) -> None:
        """Move codes that no row has chosen for a while to rows of the batch, without waiting for the device."""
        dead = self.idle_steps >= self.config.restart_after
        num_rows = len(residual) * num_processes()
        places = of_first_process(torch.rand(num_rows, device=residual.device).argsort())
        numbers = torch.arange(len(dead), device=residual.device) % num_rows
        rows = chosen_rows(residual, places[numbers]).to(self.weight.dtype)
        self.weight.copy_(torch.where(dead[:, None], rows, self.weight))
        self.idle_steps.masked_fill_(dead, 0)
        if self.config.ema_decay > 0:
            self.ema_counts.masked_fill_(dead, 1.0)
            self.ema_sums.copy_(torch.where(dead[:, None], rows, self.ema_sums))

    @torch.no_grad()
    def _observe_(self, residual: Tensor, codes: Tensor) -> None:
        """Account for what the rows of all processes chose."""
        decay, restarts = self.config.ema_decay, self.config.restart_after > 0
        if decay == 0 and not restarts:
            return
        counts, sums = codebook_stats(residual, codes, self.config.size)
        counts = sum_over_processes(counts)
        if restarts:
            self.idle_steps.add_(1).masked_fill_(counts > 0, 0)
        if decay > 0:
            sums = sum_over_processes(sums)
            self.ema_counts.lerp_(counts.to(self.ema_counts.dtype), 1 - decay)
            self.ema_sums.lerp_(sums.to(self.ema_sums.dtype), 1 - decay)
            self.weight.copy_(self._averages())

    def _averages(self) -> Tensor:
        """Sums over counts; a code that loses its rows keeps its place."""
        alive = self.ema_counts > _FADED
        return torch.where(alive[:, None], self.ema_sums / self.ema_counts.clamp(min=_FADED)[:, None], self.weight)
