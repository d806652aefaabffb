"""RQ-VAE: an autoencoder whose latent is a sum of codes, one per level (Rajput et al. 2023, section 3.1)."""

import dataclasses
import enum
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schemas import InputError
from modules.loss import quantize_loss, reconstruction_loss, residual_quantize_loss
from modules.mlp import ACTIVATIONS, MLP
from modules.quantize import QuantizeMode, Quantizer, rotation_trick, straight_through
from ops import residual_quantize, semantic_id_embedding


@dataclass(frozen=True, kw_only=True)
class RqVaeConfig:
    """Shape and behaviour of an RQ-VAE; all of it is stored beside the weights.

    Attributes:
        input_dim: width of the item features.
        embed_dim: width of the latent and of every code.
        hidden_dims: hidden widths of the encoder; the decoder mirrors them.
        codebook_sizes: codes per level; their number is the number of levels.
        mode: how gradients pass the quantizer.
        sim_vq: learn a linear map of frozen codebooks.
        codebook_normalize: put the latent and the first level's codes on the unit sphere, so that the first
            choice is by cosine; later levels quantize what is left. ROTATION_TRICK wants it: without, nothing
            keeps the latents from shrinking together with their quantization loss.
        normalize_output: scale the reconstruction of the continuous inputs to unit length; for features that
            have unit length themselves.
        commitment_weight: beta of the quantization loss.
        num_categorical: trailing inputs in [0, 1], reconstructed as logits under binary cross-entropy.
        activation: of the MLPs.
        bias: whether the MLPs' linear layers have a bias.
    """

    input_dim: int
    embed_dim: int = 32
    hidden_dims: tuple[int, ...] = (512, 256, 128)
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    mode: QuantizeMode = QuantizeMode.STRAIGHT_THROUGH
    sim_vq: bool = False
    codebook_normalize: bool = False
    normalize_output: bool = False
    commitment_weight: float = 0.25
    num_categorical: int = 0
    activation: str = "relu"
    bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        widths = (self.input_dim, self.embed_dim, *self.hidden_dims, *self.codebook_sizes)
        self._require(
            all(isinstance(width, int) and width >= 1 for width in widths),
            "input_dim, embed_dim, hidden_dims and codebook_sizes expected integers of at least 1",
        )
        self._require(len(self.codebook_sizes) >= 1, "codebook_sizes expected at least one level")
        self._require(isinstance(self.mode, QuantizeMode), f"mode expected one of {_mode_names()}")
        self._require(self.commitment_weight >= 0, "commitment_weight expected at least 0")
        self._require(
            0 <= self.num_categorical <= self.input_dim, f"num_categorical expected 0 to input_dim={self.input_dim}"
        )
        self._require(self.activation in ACTIVATIONS, f"activation expected one of {', '.join(ACTIVATIONS)}")

    def _require(self, condition: bool, expectation: str) -> None:
        if not condition:
            raise InputError(f"RqVaeConfig: {expectation}, got {self}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `from_dict` reads them back."""
        fields = dataclasses.asdict(self)
        return {
            name: value.value if isinstance(value, enum.Enum) else list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RqVaeConfig":
        """Inverse of `to_dict`.

        Raises:
            InputError: if a field is unknown, missing, or has a value that the configuration refuses.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InputError(f"RqVaeConfig: unknown fields {unknown}; valid fields: {sorted(known)}.")
        try:
            return cls(**{**fields, "mode": QuantizeMode(fields["mode"])})
        except KeyError as error:
            raise InputError(f"RqVaeConfig: field {error} is missing.") from error
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, InputError) else InputError(f"RqVaeConfig: {error}.") from error


class RqVaeOutput(NamedTuple):
    """Losses of a batch (scalars, means over the items) and the nearest codes [B, L] int64."""

    loss: Tensor
    reconstruction_loss: Tensor
    quantize_loss: Tensor
    codes: Tensor


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
        dims = (config.input_dim, *config.hidden_dims, config.embed_dim)
        self.encoder = MLP(dims, activation=config.activation, bias=config.bias)
        self.decoder = MLP(dims[::-1], activation=config.activation, bias=config.bias)
        self.quantizers = nn.ModuleList(
            Quantizer(
                size,
                config.embed_dim,
                mode=config.mode,
                sim_vq=config.sim_vq,
                normalize=config.codebook_normalize and level == 0,
            )
            for level, size in enumerate(config.codebook_sizes)
        )
        self.register_buffer("codebooks_initialized", torch.tensor(False))
        offsets = itertools.accumulate(config.codebook_sizes[:-1], initial=0)
        self.register_buffer("_level_offsets", torch.tensor(list(offsets)), persistent=False)

    def forward(self, x: Tensor, temperature: float | Tensor = 1.0) -> RqVaeOutput:
        """Loss of a batch: reconstruction summed over dimensions, plus every level's quantization loss.

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
        prediction = self.decode(embedding)
        reconstruction = reconstruction_loss(prediction, x, num_categorical=self.config.num_categorical)
        loss = (reconstruction + quantization).mean()
        return RqVaeOutput(loss, reconstruction.mean(), quantization.mean(), codes)

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
        latent = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            return residual_quantize(latent, self.codebooks(), precision=precision)[0]

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
    def initialize_codebooks_(self, x: Tensor, *, num_iterations: int = 25, seed: int = 0) -> None:
        """Set every level's codes by k-means over the residuals of a first large batch [N, input_dim]."""
        residual = self.encode(x)
        for level, quantizer in enumerate(self._levels()):
            quantizer.initialize_(residual, num_iterations=num_iterations, seed=seed + level)
            residual = residual_quantize(residual, [quantizer.codebook()])[1]
        self.codebooks_initialized.fill_(True)

    def _levels(self) -> list[Quantizer]:
        return cast(list[Quantizer], list(self.quantizers))

    def _quantize(self, latent: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's input [B, embed_dim], the quantization loss [B] and the codes [B, L]."""
        if self.training and self.config.mode is QuantizeMode.GUMBEL_SOFTMAX:
            return self._quantize_softly(latent, temperature)
        codebooks = self.codebooks()
        codes = residual_quantize(latent, codebooks)[0]
        embeddings = semantic_id_embedding(codes, torch.cat(codebooks), self._level_offsets)
        loss = residual_quantize_loss(latent, embeddings, self.config.commitment_weight)
        return self._pass_gradient(latent, embeddings.sum(dim=1)), loss, codes

    def _quantize_softly(self, latent: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Level by level, since what a soft choice leaves over depends on its noise."""
        residual = latent
        total, loss, codes = torch.zeros_like(latent), latent.new_zeros(len(latent)), []
        for quantizer in self._levels():
            quantized = quantizer(residual, temperature)
            loss = loss + quantize_loss(residual, quantized.embedding, self.config.commitment_weight)
            total = total + quantized.embedding
            codes.append(quantized.codes)
            # Only the code is detached: every level's commitment pulls at the encoder with its full weight.
            residual = residual - quantized.embedding.detach()
        return total, loss, torch.stack(codes, dim=1)

    def _pass_gradient(self, latent: Tensor, total: Tensor) -> Tensor:
        # Estimators act once, on the sum of the codes; level by level they would count the encoder L times.
        if self.config.mode is QuantizeMode.STRAIGHT_THROUGH:
            return straight_through(latent, total)
        if self.config.mode is QuantizeMode.ROTATION_TRICK:
            return rotation_trick(latent, total)
        return total


def _mode_names() -> str:
    return ", ".join(mode.name for mode in QuantizeMode)
