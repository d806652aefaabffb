"""RQ-VAEs of the older layout: a folder or Hub repository with config.json and model.safetensors, or a .pt checkpoint.

Their networks are linear layers without bias with SiLU between them; the decoder's output has unit length. With
`codebook_normalize` so have the latent and the codes of the first level. The nearest code by squared distance is taken
in evaluation, whatever the mode in training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schemas import InputError, read_safetensors
from modules.estimators import QuantizeMode
from modules.rqvae import RqVae
from modules.rqvae_config import MAX_LEVELS, RqVaeConfig
from modules.tokenizer.artifact_folder import read_json
from modules.tokenizer.hub import resolve_folder

_REQUIRED = (
    "input_dim",
    "embed_dim",
    "hidden_dims",
    "codebook_size",
    "codebook_normalize",
    "codebook_sim_vq",
    "n_layers",
    "commitment_weight",
    "n_cat_features",
)

_CHECKPOINT_SUFFIXES = (".pt", ".pth")

_MODES = {1: QuantizeMode.GUMBEL_SOFTMAX, 2: QuantizeMode.STRAIGHT_THROUGH, 3: QuantizeMode.ROTATION_TRICK}
"""Numbers of the older enumeration."""


def load_legacy(path: str | Path, *, revision: str | None = None) -> RqVae:
    """An RQ-VAE of the older layout as one of ours, giving the same codes and reconstructions.

    With categorical features the older reconstruction scales all outputs by one norm, ours only the continuous
    ones; the codes are not affected.

    Args:
        path: a folder or Hub id with `config.json` and `model.safetensors`, or a `.pt` checkpoint with the keys
            `model` and `model_config`.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if it is missing, damaged, of another layout, or a checkpoint that holds anything but tensors,
            plain values and the older implementation's own classes.
    """
    if str(path).endswith(_CHECKPOINT_SUFFIXES):
        source, (config, state) = str(path), _read_checkpoint(Path(path))
    else:
        folder = resolve_folder(path, revision=revision)
        source = str(folder)
        config, state = read_json(folder / "config.json"), read_safetensors(folder / "model.safetensors")
    return _convert(source, config, state)


def is_legacy(path: str | Path, *, revision: str | None = None) -> bool:
    """Whether a path or Hub id holds an RQ-VAE of the older layout rather than a tokenizer artifact.

    Args:
        path: as `load_legacy` takes it; a Hub repository is downloaded into the cache.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if there is neither such a folder nor such a repository.
    """
    return str(path).endswith(_CHECKPOINT_SUFFIXES) or has_older_layout(resolve_folder(path, revision=revision))


def has_older_layout(folder: Path) -> bool:
    """Whether a folder's config.json is that of an older RQ-VAE."""
    return (folder / "config.json").is_file() and "codebook_size" in read_json(folder / "config.json")


class _Inert:
    """Stands in for the older implementation's classes while a checkpoint is read: it accepts all and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass


_OLDER_CLASSES = (
    "modules.rqvae.RqVae",
    "modules.quantize.Quantize",
    "modules.quantize.QuantizeForwardMode",
    "modules.quantize.QuantizeDistance",
    "modules.encoder.MLP",
    "modules.normalize.L2NormalizationLayer",
    "modules.loss.ReconstructionLoss",
    "modules.loss.CategoricalReconstuctionLoss",
    "modules.loss.QuantizeLoss",
    "modules.loss.RqVaeLoss",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
)
"""Found in checkpoints because `model_config` recorded the constructor's local variables, the model among them."""


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist. Check the path.")
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _OLDER_CLASSES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the bytes lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} could not be read as a checkpoint of tensors and plain values ({reason}). It is damaged, or it "
            "holds code, which is never run."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), dict) for key in ("model", "model_config")
    ):
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path} expected a checkpoint with 'model' and 'model_config', got {keys}. Older checkpoints without a "
            "configuration cannot be read: write their config.json and model.safetensors into a folder."
        )
    return content["model_config"], content["model"]


def _convert(source: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> RqVae:
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise InputError(f"{source} is not an RQ-VAE of the older layout: its configuration lacks {missing}.")
    try:
        weights = {**_renamed(state), "codebooks_initialized": torch.tensor(True)}
        rqvae = RqVae.from_weights(_converted_config(config), weights)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: weights and configuration do not fit each other ({reason}).") from error
    return rqvae.float().eval()


def _converted_config(config: Mapping[str, Any]) -> RqVaeConfig:
    num_levels = config["n_layers"]
    if not isinstance(num_levels, int) or not 1 <= num_levels <= MAX_LEVELS:
        raise InputError(f"n_layers expected 1 to {MAX_LEVELS}, got {num_levels!r}.")
    return RqVaeConfig(
        input_dim=config["input_dim"],
        embed_dim=config["embed_dim"],
        hidden_dims=tuple(config["hidden_dims"]),
        codebook_sizes=(config["codebook_size"],) * num_levels,
        mode=_mode(config.get("codebook_mode")),
        sim_vq=bool(config["codebook_sim_vq"]),
        codebook_normalize=bool(config["codebook_normalize"]),
        normalize_output=True,
        commitment_weight=config["commitment_weight"],
        num_categorical=config["n_cat_features"],
        activation="silu",
        bias=False,
    )


def _mode(value: Any) -> QuantizeMode:
    """The training mode where it was recorded; the older default otherwise."""
    if isinstance(value, _Inert) and value.args:
        value = value.args[0]
    return _MODES.get(value, QuantizeMode.GUMBEL_SOFTMAX) if isinstance(value, int) else QuantizeMode.GUMBEL_SOFTMAX


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older state names as ours: mlp.{2i} is linear layer i, layers.{i} is quantizer i."""
    renamed = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"expected weights by name, got {type(tensor).__name__} for {name!r}.")
        parts = name.removeprefix("module.").removeprefix("_orig_mod.").split(".")
        if parts[0] in ("encoder", "decoder") and parts[1:2] == ["mlp"] and parts[2:3] and parts[2].isdecimal():
            parts = [parts[0], "linears", str(int(parts[2]) // 2), *parts[3:]]
        elif parts[0] == "layers" and parts[2:] == ["embedding", "weight"]:
            parts = ["quantizers", parts[1], "weight"]
        elif parts[0] == "layers" and parts[2:] == ["out_proj", "0", "weight"]:
            parts = ["quantizers", parts[1], "projection", "weight"]
        renamed[".".join(parts)] = tensor
    return renamed
