"""The model artifact: one folder, local or on the Hub, that holds all it takes to recommend.

config.json             system, model config, ranker settings
model.safetensors       weights
tokenizer/              the tokenizer artifact that the model was trained with, or a later version of its catalogue
catalogue.safetensors   the catalogue, in place of tokenizer/, of a system that has no semantic ids
items.safetensors       item features and cold flags of a model that reads them
manifest.json           format version, file hashes, hash of the tokenizer trained with, and where the model came from
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.schemas import Catalogue, InputError
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model_files import build_model, full_disk_is_os_error, moved, save_weights
from modules.systems import system_of
from modules.tokenizer.artifact_folder import (
    MANIFEST,
    file_hashes,
    read_json,
    read_manifest,
    verify_files,
    write_artifact,
    write_json,
)
from modules.tokenizer.hub import resolve_folder
from modules.tokenizer.stored import naming
from modules.tokenizer.tokenizer import SemanticIdTokenizer

KIND = "model"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
CATALOGUE, ITEMS = "catalogue.safetensors", "items.safetensors"


@dataclass(frozen=True, eq=False)
class ModelArtifact:
    """A loaded model artifact.

    Attributes:
        system: name in `modules.systems.SYSTEMS`.
        model: in evaluation mode.
        catalogue: all items that there are or were; the place of an item is its id.
        tokenizer: the one that the model was trained with, or a later version of its catalogue; None where the system
            has no semantic ids.
        items: features of the items; None where the model reads none.
        ranker_settings: keywords for the system's rankers, as saved; "mode" among them is the one that it has unless
            another is asked for.
        manifest: content of manifest.json.

    Raises:
        InputError: if the parts are not of the same items, or not those that the model needs.
    """

    system: str
    model: nn.Module
    catalogue: Catalogue
    tokenizer: SemanticIdTokenizer | None
    items: ItemTable | None
    ranker_settings: dict[str, Any]
    manifest: dict[str, Any]

    def __post_init__(self) -> None:
        system = system_of(self.system)
        if system.has_tokenizer != (self.tokenizer is not None):
            raise InputError(
                f"a {self.system!r} model {'needs a' if system.has_tokenizer else 'has no'} tokenizer, "
                f"got {'a' if self.tokenizer else 'no'} tokenizer."
            )
        if self.tokenizer is not None and self.tokenizer.catalogue is not self.catalogue:
            raise InputError("the catalogue of a model artifact is that of its tokenizer. Change both: with_catalogue.")
        _check_items(self.model, self.items, len(self.catalogue))

    @property
    def available(self) -> Tensor | None:
        """[N] bool, false for items that were removed; None where none was."""
        return None if self.tokenizer is None else self.tokenizer.available

    @property
    def catalogue_version(self) -> int:
        """1 as trained, then one more with every change of the catalogue."""
        return 1 if self.tokenizer is None else self.tokenizer.catalogue_version

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        tensor = next(chain(self.model.parameters(), self.model.buffers()), torch.empty(0))
        return tensor.device

    def tokenizer_for(self, purpose: str) -> SemanticIdTokenizer:
        """The tokenizer.

        Args:
            purpose: what it is needed for, as the error says it.

        Raises:
            InputError: if the system has none.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{purpose} needs semantic ids, which a {self.system!r} model has not: it knows the items that it was "
                "trained on, by number. Use a retrieval model."
            )
        return self.tokenizer

    def make_ranker(self, *, mode: str | None = None, **overrides: Any) -> Any:
        """The system's Ranker, in a retrieval mode of its own or in the artifact's; see `make_rankers`."""
        (ranker,) = self.make_rankers([] if mode is None else [mode], **overrides)
        return ranker

    def make_rankers(self, modes: Sequence[str] = (), **overrides: Any) -> list[Any]:
        """The system's Rankers, which share what they have in common.

        Args:
            modes: retrieval modes, one ranker for each; none takes the artifact's own.
            overrides: settings in the place of the saved ones, where not None.

        Raises:
            InputError: if the model has not these modes or settings, or the values do not fit.
        """
        system = system_of(self.system)
        given = {name: value for name, value in overrides.items() if value is not None}
        system.check_settings(self.system, given, modes)
        settings = {**self.ranker_settings, **given}
        own_mode = settings.pop("mode", None)
        if not modes and own_mode is not None:
            modes = [own_mode]
        rankers = system.make_rankers(self, modes, **settings)
        if "beam_width" in given and not any(hasattr(ranker, "beam_width") for ranker in rankers):
            names = ", ".join(ranker.name for ranker in rankers)
            raise InputError(f"{names} searches no beams, got beam_width {given['beam_width']}. Leave it out.")
        return rankers

    def with_catalogue(self, tokenizer: SemanticIdTokenizer, items: ItemTable | None = None) -> "ModelArtifact":
        """The artifact after a change of its catalogue.

        Args:
            tokenizer: a later version of the one that there is.
            items: features of the tokenizer's items; None where the model reads none.

        Raises:
            InputError: if the two are not of the same items.
        """
        return replace(self, tokenizer=tokenizer, catalogue=tokenizer.catalogue, items=items)

    def save(self, folder: Path | str) -> None:
        """Write the artifact, whole or not at all; an older one at that place is replaced.

        After a change of the catalogue: `artifact.with_catalogue(tokenizer, items).save(folder)`.

        Raises:
            InputError: if the tokenizer is no version of the one that the model was trained with, something else is
                there, or the place cannot be written.
        """
        save_model_artifact(
            folder,
            self.model,
            self.tokenizer or self.catalogue,
            self.manifest,
            ranker_settings=self.ranker_settings,
            system=self.system,
            items=self.items,
            tokenizer_hash=self.manifest.get("tokenizer_hash"),
        )


def save_model_artifact(
    folder: Path | str,
    model: nn.Module,
    catalogue: SemanticIdTokenizer | Catalogue,
    manifest_extra: Mapping[str, Any],
    *,
    ranker_settings: Mapping[str, Any],
    system: str = "retrieval",
    items: ItemTable | None = None,
    tokenizer_hash: str | None = None,
) -> None:
    """Write a model artifact, whole or not at all; an older one at that place is replaced.

    Args:
        folder: where to.
        model: of the system's class, not wrapped, with its config as `model.config`.
        catalogue: the tokenizer that the model was trained with, or a later version of its catalogue; of a system
            without semantic ids the catalogue itself.
        manifest_extra: where the model came from: dataset request, dataset manifest hash, commit, versions.
        ranker_settings: keywords for the system's rankers, such as beam_width and max_history.
        system: name in `modules.systems.SYSTEMS`.
        items: features of the items, for a model that reads them.
        tokenizer_hash: content hash of the tokenizer that the model was trained with; None says that it is this one.

    Raises:
        InputError: if the tokenizer is no version of the one trained with, the parts do not fit each other, something
            else is there, or the place cannot be written.
    """
    tokenizer = catalogue if isinstance(catalogue, SemanticIdTokenizer) else None
    known_items = catalogue.catalogue if isinstance(catalogue, SemanticIdTokenizer) else catalogue
    parts = ModelArtifact(system, model, known_items, tokenizer, items, dict(ranker_settings), dict(manifest_extra))
    if tokenizer is not None:
        tokenizer_hash = tokenizer.content_hash if tokenizer_hash is None else tokenizer_hash
        _check_trained_with(tokenizer, tokenizer_hash, "the tokenizer to be saved")
    write_artifact(Path(folder), KIND, lambda temporary: _write_files(temporary, parts, tokenizer_hash))


def load_model_artifact(folder_or_hub_id: Path | str, *, device: torch.device | str = "cpu") -> ModelArtifact:
    """Read and verify a model artifact.

    Args:
        folder_or_hub_id: an artifact's folder, a run folder (its model/ is read) or a Hub repository.
        device: where the model shall lie.

    Raises:
        InputError: if the artifact is missing, damaged, of a newer format or of an unknown system, its parts do not fit
            each other, its tokenizer is not the one that the model was trained with, or there is no such device.
    """
    folder = _artifact_folder(resolve_folder(folder_or_hub_id))
    manifest = read_manifest(folder, KIND, FORMAT_VERSION, (CONFIG, WEIGHTS))
    config = read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        system = system_of(config.get("system"))
    model = moved(build_model(folder / WEIGHTS, system, config.get("model")), device).eval()
    tokenizer = None
    if system.has_tokenizer:
        tokenizer = SemanticIdTokenizer.from_pretrained(_tokenizer_folder(folder))
        _check_trained_with(tokenizer, manifest.get("tokenizer_hash"), folder / TOKENIZER)
        catalogue = tokenizer.catalogue
    else:
        verify_files(folder, manifest, [CATALOGUE])
        catalogue = Catalogue.load(folder / CATALOGUE)
    items = None
    if _item_config(model) is not None:
        verify_files(folder, manifest, [ITEMS])
        items = ItemTable.load(folder / ITEMS)
    settings = dict(config.get("ranker", {}))
    with naming(folder):
        return ModelArtifact(config["system"], model, catalogue, tokenizer, items, settings, manifest)


def _check_trained_with(tokenizer: SemanticIdTokenizer, tokenizer_hash: Any, place: object) -> None:
    if not tokenizer.is_version_of(tokenizer_hash):
        raise InputError(
            f"{place} is not the tokenizer that this model was trained with: expected content hash {tokenizer_hash}, "
            f"got {tokenizer.content_hash}, nor a later version of its catalogue. Put the model's own tokenizer back."
        )


def _check_items(model: nn.Module, items: ItemTable | None, num_items: int) -> None:
    """A model of the catalogue's items, with features of each exactly where it reads them (InputError)."""
    known_items = getattr(_config_of(model), "num_items", num_items)
    if known_items != num_items:
        raise InputError(f"the model is of {known_items} items, the catalogue has {num_items}. Put its own back.")
    config = _item_config(model)
    expected = None if config is None else [num_items, config.num_features]
    got = None if items is None else [len(items), items.width]
    if got != expected:
        raise InputError(
            f"expected item features of shape {expected}, a row per item of the catalogue and the width that the model "
            f"reads (None where it reads none), got {got}. Put the features back that belong to this catalogue."
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


def _config_of(model: nn.Module) -> Any:
    return model.config


def _item_config(model: nn.Module) -> ItemInputConfig | None:
    """How a model reads item features; None where it reads none."""
    return getattr(_config_of(model), "items", None)


def _write_files(folder: Path, artifact: ModelArtifact, tokenizer_hash: str | None) -> None:
    names = [CONFIG, WEIGHTS]
    config = {
        "system": artifact.system,
        "model": _config_of(artifact.model).to_dict(),
        "ranker": artifact.ranker_settings,
    }
    write_json(folder / CONFIG, config)
    with full_disk_is_os_error():
        save_weights(artifact.model, folder / WEIGHTS)
        if artifact.items is not None:
            artifact.items.save(folder / ITEMS)
            names.append(ITEMS)
        if artifact.tokenizer is None:
            artifact.catalogue.save(folder / CATALOGUE)
            names.append(CATALOGUE)
    trained_with = {}
    if artifact.tokenizer is not None:
        artifact.tokenizer.save_pretrained(folder / TOKENIZER)
        trained_with = {"tokenizer_hash": tokenizer_hash}
    manifest = {
        **artifact.manifest,
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        **trained_with,
        "files": file_hashes(folder, names),
    }
    write_json(folder / MANIFEST, manifest)
