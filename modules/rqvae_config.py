"""Shape and behaviour of an RQ-VAE, level by level, as one object that is stored beside its weights."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.schemas import InputError
from modules.estimators import QuantizeMode
from modules.mlp import ACTIVATIONS
from modules.quantize import Distance, LevelConfig

ENCODERS = ("mlp", "skip", "identity")

MAX_LEVELS = 8

_LEAST_EPSILON = 1e-6
"""Smaller ones leave the range of fp32, and mean the nearest code anyway."""

_ENUMS: dict[str, type[enum.Enum]] = {"mode": QuantizeMode, "distance": Distance}

_ADDED_LATER = (
    "distance",
    "sinkhorn_epsilon",
    "ema_decay",
    "restart_after",
    "separation_weight",
    "separation_margin",
    "encoder",
)
"""Written only where they differ from their defaults, so that earlier artifacts keep their content hash."""


@dataclass(frozen=True, kw_only=True)
class RqVaeConfig:
    """Shape and behaviour of an RQ-VAE; all of it is stored beside the weights.

    The fields from `mode` to `restart_after` are one value for all levels, or a tuple with one for each.

    Attributes:
        input_dim: width of the item features.
        embed_dim: width of the latent and of every code.
        hidden_dims: hidden widths of the encoder; the decoder mirrors them.
        codebook_sizes: codes per level; their number, at most 8, is the number of levels.
        mode: how gradients pass the quantizer; a run of equal modes passes them on from the sum of its codes.
        sim_vq: learn a linear map of frozen codebooks.
        distance: by which the nearest code is chosen.
        sinkhorn_epsilon: 0, or how loosely training balances the rows of a batch over the codes (0.003 in MQL4GRec, for
            the last level); what is trained chooses the nearest code in any case.
        ema_decay: 0 for codes that learn by gradient, else the weight that a code's past keeps in its moving average
            (0.99, for instance) from batch to batch.
        restart_after: 0, or after how many batches without a row a code is moved to a row of the next one.
        codebook_normalize: put the latent and the first level's codes on the unit sphere, so that the first
            choice is by cosine; later levels quantize what is left. ROTATION_TRICK wants it: without, nothing
            keeps the latents from shrinking together with their quantization loss.
        normalize_output: scale the reconstruction of the continuous inputs to unit length; for features that
            have unit length themselves.
        commitment_weight: beta of the quantization loss.
        separation_weight: 0, or how strongly training pushes items of a batch that share all codes to last codes of
            their own; they have to meet in a batch, see `train_rqvae.train.neighbours_together`.
        separation_margin: of `modules.separation.separation_loss`.
        num_categorical: trailing inputs in [0, 1], reconstructed as logits under binary cross-entropy.
        activation: of the MLPs.
        bias: whether the MLPs' linear layers have a bias.
        encoder: "mlp"; "skip" for an MLP plus a linear map, at first the projection on principal components, so that
            training begins where residual k-means ends; or "identity" to quantize the features themselves: with
            codebooks by k-means that is residual k-means, which needs no training, and where embed_dim and hidden_dims
            have no effect.
    """

    input_dim: int
    embed_dim: int = 32
    hidden_dims: tuple[int, ...] = (512, 256, 128)
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    mode: QuantizeMode | tuple[QuantizeMode, ...] = QuantizeMode.STRAIGHT_THROUGH
    sim_vq: bool | tuple[bool, ...] = False
    distance: Distance | tuple[Distance, ...] = Distance.L2
    sinkhorn_epsilon: float | tuple[float, ...] = 0.0
    ema_decay: float | tuple[float, ...] = 0.0
    restart_after: int | tuple[int, ...] = 0
    codebook_normalize: bool = False
    normalize_output: bool = False
    commitment_weight: float = 0.25
    separation_weight: float = 0.0
    separation_margin: float = 0.2
    num_categorical: int = 0
    activation: str = "relu"
    bias: bool = True
    encoder: str = "mlp"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        self._require(self.encoder in ENCODERS, f"encoder expected one of {', '.join(ENCODERS)}", "encoder")
        if self.encoder == "identity":
            object.__setattr__(self, "embed_dim", self.input_dim)
            object.__setattr__(self, "hidden_dims", ())
        self._check_sizes()
        for level, config in enumerate(self.levels):
            self._check_level(level, config)

    @property
    def levels(self) -> tuple[LevelConfig, ...]:
        """The settings of every level."""
        names = ("mode", "sim_vq", "distance", "sinkhorn_epsilon", "ema_decay", "restart_after")
        columns = {name: self._per_level(name) for name in names}
        return tuple(
            LevelConfig(
                size=size,
                normalize=self.codebook_normalize and level == 0,
                **{name: column[level] for name, column in columns.items()},
            )
            for level, size in enumerate(self.codebook_sizes)
        )

    @property
    def uses_temperature(self) -> bool:
        """Whether a level chooses softly, by the Gumbel softmax."""
        return any(level.mode is QuantizeMode.GUMBEL_SOFTMAX for level in self.levels)

    def _per_level(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * len(self.codebook_sizes)
        expectation = f"{name} expected one value, or one for each of the {len(self.codebook_sizes)} levels"
        self._require(len(value) == len(self.codebook_sizes), expectation, name, "codebook_sizes")
        return value

    def _check_sizes(self) -> None:
        for name in ("input_dim", "embed_dim", "hidden_dims", "codebook_sizes"):
            value = getattr(self, name)
            widths = value if isinstance(value, tuple) else (value,)
            positive = all(isinstance(width, int) and width >= 1 for width in widths)
            self._require(positive, f"{name} expected integers of at least 1", name)
        num_levels = len(self.codebook_sizes)
        self._require(
            1 <= num_levels <= MAX_LEVELS, f"codebook_sizes expected one to {MAX_LEVELS} levels", "codebook_sizes"
        )
        for name in ("commitment_weight", "separation_weight", "separation_margin"):
            value = getattr(self, name)
            self._require(math.isfinite(value) and value >= 0, f"{name} expected at least 0", name)
        few = 0 <= self.num_categorical <= self.input_dim
        self._require(few, f"num_categorical expected 0 to input_dim={self.input_dim}", "num_categorical")
        known = self.activation in ACTIVATIONS
        self._require(known, f"activation expected one of {', '.join(ACTIVATIONS)}", "activation")
        narrow = self.encoder != "skip" or self.embed_dim <= self.input_dim
        self._require(narrow, 'encoder = "skip" expected embed_dim of at most input_dim', "embed_dim", "input_dim")
        if self.encoder == "identity":
            plain = 'encoder = "identity" takes its codebooks from k-means: expected'
            self._require(self.num_categorical == 0, f"{plain} num_categorical = 0", "num_categorical")
            by_l2 = all(level.distance is Distance.L2 for level in self.levels)
            self._require(by_l2, f"{plain} distance = Distance.L2", "distance")

    def _check_level(self, level: int, config: LevelConfig) -> None:
        where, soft = f"level {level}: ", config.mode is QuantizeMode.GUMBEL_SOFTMAX
        for name, kind in _ENUMS.items():
            choices = ", ".join(choice.name for choice in kind)
            self._require(isinstance(getattr(config, name), kind), f"{where}{name} expected one of {choices}", name)
        self._require(
            config.sinkhorn_epsilon == 0 or _LEAST_EPSILON <= config.sinkhorn_epsilon < math.inf,
            f"{where}sinkhorn_epsilon expected 0 (the nearest code) or at least {_LEAST_EPSILON:g}",
            "sinkhorn_epsilon",
        )
        decays = 0 <= config.ema_decay < 1
        self._require(decays, f"{where}ema_decay expected 0 (learned by gradient) up to below 1", "ema_decay")
        waits = config.restart_after >= 0
        self._require(waits, f"{where}restart_after expected 0 (never) or a number of batches", "restart_after")
        self._require(
            not (soft and (config.sinkhorn_epsilon > 0 or config.ema_decay > 0)),
            f"{where}GUMBEL_SOFTMAX chooses softly and by gradient: expected sinkhorn_epsilon = 0 and ema_decay = 0",
            "sinkhorn_epsilon",
            "ema_decay",
        )
        self._require(
            not (config.sim_vq and (config.ema_decay > 0 or config.restart_after > 0)),
            f"{where}sim_vq freezes the codes: expected ema_decay = 0 and restart_after = 0",
            "ema_decay",
            "restart_after",
        )

    def _require(self, condition: bool, expectation: str, *names: str) -> None:
        """InputError that says what was expected, and what the fields of these names hold."""
        if not condition:
            got = ", ".join(f"{name} = {getattr(self, name)!r}" for name in names)
            raise InputError(f"RqVaeConfig: {expectation}, got {got}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `from_dict` reads them back."""
        return {
            field.name: _as_json(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in _ADDED_LATER or getattr(self, field.name) != field.default
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
        if "mode" not in fields:
            raise InputError("RqVaeConfig: field 'mode' is missing.")
        try:
            return cls(**{name: _from_json(name, value) for name, value in fields.items()})
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, InputError) else InputError(f"RqVaeConfig: {error}.") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(name, item) for item in value)
    return _ENUMS[name](value) if name in _ENUMS else value
