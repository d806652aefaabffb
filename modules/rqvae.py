"""RQ-VAE: an autoencoder whose latent is a sum of codes, one per level (Rajput et al. 2023, section 3.1)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schemas import InputError
from modules.estimators import pass_gradient
from modules.loss import quantize_loss, reconstruction_loss, residual_quantize_loss
from modules.mlp import MLP, SkipMLP
from modules.quantize import Distance, Quantizer
from modules.rqvae_config import RqVaeConfig
from modules.separation import separation_loss
from ops import residual_quantize, semantic_id_embedding

__all__ = ["RqVae", "RqVaeConfig", "RqVaeOutput"]


class RqVaeOutput(NamedTuple):
    """Losses of a batch (scalars, means over the items) and its codes [B, L] int64; separation is 0 in evaluation."""

    loss: Tensor
    reconstruction_loss: Tensor
    quantize_loss: Tensor
    codes: Tensor
    separation_loss: Tensor


class RqVae(nn.Module):
    """Encoder, residual quantizer and decoder.

    The buffer `codebooks_initialized` says whether `initialize_codebooks_` has run; it is saved with the weights,
    so a reloaded model is not initialised a second time.
    """

    codebooks_initialized: Tensor
    _level_offsets: Tensor

    def __init__(self, config: RqVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.encoder == "identity":
            self.encoder, self.decoder = nn.Identity(), nn.Identity()
        else:
            network = SkipMLP if config.encoder == "skip" else MLP
            dims = (config.input_dim, *config.hidden_dims, config.embed_dim)
            self.encoder = network(dims, activation=config.activation, bias=config.bias)
            self.decoder = network(dims[::-1], activation=config.activation, bias=config.bias)
        self.quantizers = nn.ModuleList(Quantizer(config.embed_dim, level) for level in config.levels)
        self.register_buffer("codebooks_initialized", torch.tensor(False))
        offsets = itertools.accumulate(config.codebook_sizes[:-1], initial=0)
        self.register_buffer("_level_offsets", torch.tensor(list(offsets)), persistent=False)

    @classmethod
    def from_weights(cls, config: RqVaeConfig, state: Mapping[str, Tensor]) -> "RqVae":
        """A model with these weights, once it is known that they are finite and of the sizes that `config` says.

        A few lines of configuration can ask for more memory than there is, so that sizes are compared without any.

        Raises:
            InputError: if a weight holds NaN or infinity.
            RuntimeError: if names or sizes are others.
        """
        for name, tensor in state.items():
            if not bool(tensor.isfinite().all()):
                raise InputError(f"the weight {name} holds NaN or infinity. Take an earlier checkpoint.")
        with torch.device("meta"):
            cls(config).load_state_dict(state, assign=True)
        rqvae = cls(config)
        rqvae.load_state_dict(state)
        return rqvae

    def forward(self, x: Tensor, temperature: float | Tensor = 1.0) -> RqVaeOutput:
        """Loss of a batch: reconstruction summed over dimensions, every level's quantization loss, and separation.

        Distances and losses compute in fp32 or better, also under autocast.

        Args:
            x: [B, input_dim].
            temperature: of the Gumbel softmax; the other modes ignore it.

        Raises:
            InputError: if x has another width.
        """
        latent = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            embedding, quantization, codes = self._quantize(latent, temperature)
            separation = self._separation(latent, codes)
        prediction = self.decode(embedding)
        reconstruction = reconstruction_loss(prediction, x, num_categorical=self.config.num_categorical)
        loss = (reconstruction + quantization).mean() + self.config.separation_weight * separation
        return RqVaeOutput(loss, reconstruction.mean(), quantization.mean(), codes, separation)

    def encode(self, x: Tensor) -> Tensor:
        """Latents [B, embed_dim] of features [B, input_dim], in fp32 or better; InputError for another width."""
        self.check_width(x.shape)
        latent = self.encoder(x)
        latent = latent.float() if latent.dtype.itemsize < 4 else latent
        return F.normalize(latent, dim=-1) if self.config.codebook_normalize else latent

    def check_width(self, shape: Sequence[int]) -> None:
        """Refuse features of a shape other than [B, input_dim] (InputError)."""
        width = self.config.input_dim
        if len(shape) != 2 or shape[1] != width:
            raise InputError(
                f"RqVae.encode expected x of shape [B, {width}] (input_dim={width}), got {list(shape)}. "
                f"Set RqVaeConfig.input_dim = {shape[-1] if shape else 1} or rebuild the item features."
            )

    def decode(self, embedding: Tensor) -> Tensor:
        """Reconstruction [B, input_dim] of [B, embed_dim]; the trailing categorical columns are logits."""
        prediction = self.decoder(embedding)
        if not self.config.normalize_output:
            return prediction
        split = self.config.input_dim - self.config.num_categorical
        return torch.cat([F.normalize(prediction[:, :split], dim=-1), prediction[:, split:]], dim=-1)

    def codebooks(self) -> list[Tensor]:
        """The codes of every level as they are compared and added: [K_l, embed_dim] each."""
        return [quantizer.codebook() for quantizer in self._levels()]

    @torch.no_grad()
    def semantic_ids(self, x: Tensor, *, precision: str = "ieee") -> Tensor:
        """Nearest codes [B, L] int64 of features [B, input_dim].

        Autocast reaches the encoder alone; distances compute in fp32 or better.

        Args:
            x: [B, input_dim].
            precision: of the distances' products, see `ops.residual_quantize`.

        Raises:
            InputError: if x has another width.
        """
        return self.quantize(self.encode(x), precision=precision)[0]

    @torch.no_grad()
    def quantize(self, latent: Tensor, *, precision: str = "ieee") -> tuple[Tensor, Tensor]:
        """Nearest codes of latents [B, embed_dim], level by level, whatever training would choose.

        Returns:
            codes [B, L] int64, and what they leave over [B, embed_dim], in fp32 or better.
        """
        with torch.autocast(latent.device.type, enabled=False):
            if all(level.distance is Distance.L2 for level in self.config.levels):
                return residual_quantize(latent, self.codebooks(), precision=precision)
            residual = latent.float() if latent.dtype.itemsize < 4 else latent
            codes = []
            for quantizer in self._levels():
                codes.append(quantizer.nearest(residual))
                residual = residual - F.embedding(codes[-1], quantizer.codebook())
            return torch.stack(codes, dim=1), residual

    def embed(self, codes: Tensor) -> Tensor:
        """Sum [B, embed_dim] of the codes [B, L] int64 of all levels, which the decoder reads."""
        return semantic_id_embedding(codes, torch.cat(self.codebooks()), self._level_offsets).sum(dim=1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """What the codes of features [B, input_dim] keep of them, [B, input_dim]."""
        return self.decode(self.embed(self.semantic_ids(x)))

    @torch.no_grad()
    def level_costs(self, residual: Tensor, level: int) -> Tensor:
        """[B, K_l] what the choice of a level minimises for [B, embed_dim]: squared distances, or negative cosines."""
        with torch.autocast(residual.device.type, enabled=False):
            return self._levels()[level].costs(residual)

    def fit_autoencoder_(
        self, x: Tensor, *, num_steps: int, batch_size: int = 512, learning_rate: float = 1e-3, seed: int = 0
    ) -> None:
        """Train encoder and decoder alone for a few hundred steps: the first half of the initialisation.

        Codebooks that k-means sets on an untrained encoder lose most of their codes as the latents move away from
        under them; on a roughly trained one they keep them. The same data and seed give the same weights.

        Args:
            x: [N, input_dim], the rows on which `initialize_codebooks_` will run.
            num_steps: of AdamW.
            batch_size: rows per step.
            learning_rate: of AdamW.
            seed: of the order of rows.
        """
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW([*self.encoder.parameters(), *self.decoder.parameters()], lr=learning_rate)
        for _ in range(num_steps):
            batch = x[torch.randint(len(x), (min(batch_size, len(x)),), generator=generator).to(x.device)]
            prediction = self.decode(self.encode(batch))
            loss = reconstruction_loss(prediction, batch, num_categorical=self.config.num_categorical).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def set_principal_components_(self, x: Tensor) -> None:
        """Let an encoder with a skip connection begin as the projection of rows [N, input_dim] on their principal
        components, and the decoder as its inverse.

        With such an encoder, training begins where residual k-means of the projection ends.
        """
        mean = x.double().mean(dim=0)
        centred = x.double() - mean
        components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : self.config.embed_dim]
        encoder, decoder = cast(SkipMLP, self.encoder), cast(SkipMLP, self.decoder)
        encoder.skip.weight.copy_(components.T)
        decoder.skip.weight.copy_(components)
        if self.config.bias:
            encoder.skip.bias.copy_(-(mean @ components))
            decoder.skip.bias.copy_(mean)

    @torch.no_grad()
    def initialize_codebooks_(self, x: Tensor, *, num_rounds: int = 0, seed: int = 0) -> None:
        """Set every level's codes by k-means over the residuals of a first large batch [N, input_dim].

        Args:
            x: [N, input_dim].
            num_rounds: of `modules.kmeans.kmeans`; they lower its error by some percent.
            seed: of k-means.
        """
        residual = self.encode(x)
        for level, quantizer in enumerate(self._levels()):
            quantizer.initialize_(residual, num_rounds=num_rounds, seed=seed + level)
            residual = residual - F.embedding(quantizer.nearest(residual), quantizer.codebook())
        self.codebooks_initialized.fill_(True)

    @torch.no_grad()
    def set_codebooks_(self, codebooks: Sequence[Tensor]) -> None:
        """Set every level's codes to [K_l, embed_dim] that were found elsewhere."""
        for quantizer, codes in zip(self._levels(), codebooks, strict=True):
            quantizer.set_codes_(codes)
        self.codebooks_initialized.fill_(True)

    def _levels(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.quantizers))

    def _separation(self, latent: Tensor, codes: Tensor) -> Tensor:
        """Mean `separation_loss` of the codes that evaluation would choose, which may be others than training's."""
        if not self.training or self.config.separation_weight == 0:
            return latent.new_zeros(())
        if not all(level.is_plain for level in self.config.levels):
            codes = self.quantize(latent.detach())[0]
        last = self._levels()[-1]
        residual = latent
        for level, quantizer in enumerate(self._levels()[:-1]):
            residual = residual - F.embedding(codes[:, level], quantizer.codebook().detach())
        margin = self.config.separation_margin
        return separation_loss(last.compared(residual), codes, last.compared_codes(), margin=margin).mean()

    def _quantize(self, latent: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's input [B, embed_dim], the quantization loss [B] and the codes [B, L]."""
        plain = all(level.is_plain for level in self.config.levels)
        modes = {level.mode for level in self.config.levels}
        if len(modes) > 1 or (self.training and not plain):
            return self._quantize_by_level(latent, temperature)
        codes = self.quantize(latent)[0]
        codebooks = self.codebooks()
        embeddings = semantic_id_embedding(codes, torch.cat(codebooks), self._level_offsets)
        loss = residual_quantize_loss(latent, embeddings, self.config.commitment_weight)
        # Estimators act once, on the sum of the codes; level by level they would count the encoder L times.
        return pass_gradient(modes.pop(), latent, embeddings.sum(dim=1)), loss, codes

    def _quantize_by_level(self, latent: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, level by level, since what a level leaves over depends on its noise, its balance or its past."""
        residual, left = latent, latent  # equal in value; what is left has the gradient that earlier runs have passed
        passed, loss, codes = torch.zeros_like(latent), latent.new_zeros(len(latent)), []
        for mode, run in itertools.groupby(self._levels(), key=lambda quantizer: quantizer.config.mode):
            total = torch.zeros_like(latent)
            for quantizer in run:
                quantized = quantizer(left - total.detach(), temperature)
                loss = loss + quantize_loss(residual, quantized.embedding, self.config.commitment_weight)
                total = total + quantized.embedding
                codes.append(quantized.codes)
                # Only the code is detached: every level's commitment pulls at the encoder with its full weight.
                residual = residual - quantized.embedding.detach()
            moved = pass_gradient(mode, left, total)
            passed, left = passed + moved, left - moved
        return passed, loss, torch.stack(codes, dim=1)
