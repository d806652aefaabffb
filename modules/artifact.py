"""The model artifact: one folder, local or on the Hub, that holds all it takes to recommend.

config.json         system, model config, ranker settings
model.safetensors   weights
tokenizer/          the tokenizer artifact that the model was trained with, or a later version of its catalogue
manifest.json       format version, file hashes, hash of the tokenizer trained with, and where the model came from
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from data.schemas import InputError, read_safetensors
from modules.generation.ranker import GenerativeRanker
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.artifact_folder import (
    MANIFEST,
    file_hashes,
    read_json,
    read_manifest,
    write_artifact,
    write_json,
)
from modules.tokenizer.hub import resolve_folder
from modules.tokenizer.tokenizer import SemanticIdTokenizer

KIND = "model"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"


@dataclass(frozen=True)
class System:
    """How the artifact of one kind of model becomes objects again.

    Attributes:
        config_class: has `to_dict` and the class method `from_dict`; a model keeps its own as `model.config`.
        model_class: called with a config.
        ranker_class: called with model, tokenizer and, as keywords, the ranker settings.
    """

    config_class: Any
    model_class: Callable[[Any], nn.Module]
    ranker_class: Callable[..., Any]


SYSTEMS: dict[str, System] = {
    "retrieval": System(RetrievalModelConfig, EncoderDecoderRetrievalModel, GenerativeRanker),
}
"""What config.json may name as its system; another kind of model adds its entry here."""


@dataclass(frozen=True, eq=False)
class ModelArtifact:
    """A loaded model artifact.

    Attributes:
        system: name in SYSTEMS.
        model: in evaluation mode.
        tokenizer: the one that the model was trained with, or a later version of its catalogue.
        ranker_settings: keywords for the system's ranker, as saved.
        manifest: content of manifest.json.
    """

    system: str
    model: nn.Module
    tokenizer: SemanticIdTokenizer
    ranker_settings: dict[str, Any]
    manifest: dict[str, Any]

    def make_ranker(self, **overrides: Any) -> Any:
        """The system's Ranker with the saved settings; overrides that are not None replace them."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return SYSTEMS[self.system].ranker_class(self.model, self.tokenizer, **{**self.ranker_settings, **given})

    def save(self, folder: Path | str) -> None:
        """Write the artifact, whole or not at all; an older one at that place is replaced.

        After a change of the catalogue: `dataclasses.replace(artifact, tokenizer=changed).save(folder)`.

        Raises:
            InputError: if the tokenizer is no version of the one that the model was trained with, something else is
                there, or the place cannot be written.
        """
        save_model_artifact(
            folder,
            self.model,
            self.tokenizer,
            self.manifest,
            ranker_settings=self.ranker_settings,
            system=self.system,
            tokenizer_hash=self.manifest["tokenizer_hash"],
        )


def save_model_artifact(
    folder: Path | str,
    model: nn.Module,
    tokenizer: SemanticIdTokenizer,
    manifest_extra: Mapping[str, Any],
    *,
    ranker_settings: Mapping[str, Any],
    system: str = "retrieval",
    tokenizer_hash: str | None = None,
) -> None:
    """Write a model artifact, whole or not at all; an older one at that place is replaced.

    Args:
        folder: where to.
        model: of the system's class, not wrapped, with its config as `model.config`.
        tokenizer: the one that the model was trained with, or a later version of its catalogue.
        manifest_extra: where the model came from: dataset request, dataset manifest hash, commit, versions.
        ranker_settings: keywords for the system's ranker, such as beam_width and max_history.
        system: name in SYSTEMS.
        tokenizer_hash: content hash of the tokenizer that the model was trained with; None says that it is this one.

    Raises:
        InputError: if the tokenizer is no version of the one trained with, something else is there, or the place
            cannot be written.
    """
    tokenizer_hash = tokenizer.content_hash if tokenizer_hash is None else tokenizer_hash
    _check_trained_with(tokenizer, tokenizer_hash, "the tokenizer to be saved")
    config = {"system": system, "model": _config_of(model).to_dict(), "ranker": dict(ranker_settings)}

    def write(temporary: Path) -> None:
        write_json(temporary / CONFIG, config)
        _write_weights(model, temporary / WEIGHTS)
        tokenizer.save_pretrained(temporary / TOKENIZER)
        manifest = {
            **manifest_extra,
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "tokenizer_hash": tokenizer_hash,
            "files": file_hashes(temporary, (CONFIG, WEIGHTS)),
        }
        write_json(temporary / MANIFEST, manifest)

    write_artifact(Path(folder), KIND, write)


def load_model_artifact(folder_or_hub_id: Path | str, *, device: torch.device | str = "cpu") -> ModelArtifact:
    """Read and verify a model artifact.

    Args:
        folder_or_hub_id: an artifact's folder, a run folder (its model/ is read) or a Hub repository.
        device: where the model shall lie.

    Raises:
        InputError: if the artifact is missing, damaged, of a newer format or of an unknown system, its tokenizer is not
            the one that the model was trained with, or there is no such device.
    """
    folder = _artifact_folder(resolve_folder(folder_or_hub_id))
    manifest = read_manifest(folder, KIND, FORMAT_VERSION, (CONFIG, WEIGHTS))
    tokenizer = SemanticIdTokenizer.from_pretrained(_tokenizer_folder(folder))
    _check_trained_with(tokenizer, manifest.get("tokenizer_hash"), folder / TOKENIZER)
    config = read_json(folder / CONFIG)
    model = _moved(_build_model(folder, config), device).eval()
    return ModelArtifact(config["system"], model, tokenizer, dict(config.get("ranker", {})), manifest)


def _check_trained_with(tokenizer: SemanticIdTokenizer, tokenizer_hash: Any, place: object) -> None:
    if not tokenizer.is_version_of(tokenizer_hash):
        raise InputError(
            f"{place} is not the tokenizer that this model was trained with: expected content hash {tokenizer_hash}, "
            f"got {tokenizer.content_hash}, nor a later version of its catalogue. Put the model's own tokenizer back."
        )


def _artifact_folder(folder: Path) -> Path:
    """The folder itself, or the model/ folder of a run."""
    run_model = folder / "model"
    if (folder / WEIGHTS).is_file() or (folder / MANIFEST).is_file():
        return folder
    if run_model.is_dir():
        return run_model
    raise InputError(
        f"{folder} holds no model artifact: expected {MANIFEST} and {WEIGHTS} in it or in its model/ folder. "
        "A run writes them when its training ends; give the run's folder, or that of a model artifact."
    )


def _tokenizer_folder(folder: Path) -> Path:
    if not (folder / TOKENIZER).is_dir():
        raise InputError(f"{folder} is not whole: the folder {TOKENIZER} is missing. Copy the artifact again.")
    return folder / TOKENIZER


def _build_model(folder: Path, config: dict[str, Any]) -> nn.Module:
    name = config.get("system")
    if name not in SYSTEMS:
        raise InputError(
            f"{folder / CONFIG} names the system {name!r}, this library knows: {', '.join(sorted(SYSTEMS))}. "
            "Update the library."
        )
    try:
        model = SYSTEMS[name].model_class(SYSTEMS[name].config_class.from_dict(config["model"]))
        model.load_state_dict(read_safetensors(folder / WEIGHTS))
    except (KeyError, TypeError, RuntimeError) as error:  # no model config; weights of other names or shapes
        raise InputError(f"{folder} contradicts itself ({error}). Copy or save the artifact again.") from error
    return model


def _moved(model: nn.Module, device: torch.device | str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by what is wrong with the device
        reason = str(error).splitlines()[0]
        raise InputError(f"the model cannot be put on the device {str(device)!r}: {reason}. Try cpu.") from error


def _config_of(model: nn.Module) -> Any:
    return model.config


def _write_weights(model: nn.Module, path: Path) -> None:
    weights: dict[str, Tensor] = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, path)
    except SafetensorError as error:  # a full disk reaches Python as this, not as an OSError
        raise OSError(str(error)) from error
