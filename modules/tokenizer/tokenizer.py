"""The frozen tokenizer: items as tuples of codes, and the artifact that keeps them."""

import copy
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.schemas import Catalogue, InputError, read_safetensors
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.artifact_folder import (
    MANIFEST,
    file_hashes,
    read_json,
    read_manifest,
    verify_files,
    write_artifact,
    write_json,
)
from modules.tokenizer.assign import FeatureMatrix, assign_codes
from modules.tokenizer.collisions import (
    check_codes,
    check_dedup_capacity,
    codebook_health,
    dedup_capacity,
    dedup_codes,
)
from modules.tokenizer.hub import resolve_folder, upload_folder
from modules.tokenizer.legacy import has_older_layout
from modules.tokenizer.model_card import model_card

KIND = "semantic-id tokenizer"
FORMAT_VERSION = 1

_LANGUAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


_ENCODER_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SemanticIdTokenizer:
    """Items of a catalogue as semantic ids, and the RQ-VAE that gives new features their codes.

    Nothing in it trains: the RQ-VAE is in evaluation mode and without gradients.

    Attributes:
        rqvae: the frozen RQ-VAE.
        semantic_ids: [N, L] int64 on the CPU; the last column is the dedup code.
        level_sizes: codes per level; the last is what is reserved for the dedup level.
        catalogue: the items, in the order of the rows.
        language: name of the code language.
        manifest: where features, data and codes came from.
    """

    def __init__(
        self,
        rqvae: RqVae,
        semantic_ids: Tensor,
        level_sizes: tuple[int, ...],
        catalogue: Catalogue,
        *,
        language: str,
        manifest: dict[str, Any],
    ) -> None:
        if not _LANGUAGE_NAME.fullmatch(language):
            raise InputError(f"language expected lower-case letters, digits and underscores, got {language!r}.")
        if len(semantic_ids) != len(catalogue):
            raise InputError(f"expected semantic ids of {len(catalogue)} catalogue items, got {len(semantic_ids)}.")
        if level_sizes[:-1] != rqvae.config.codebook_sizes:
            raise InputError(
                f"expected level sizes {rqvae.config.codebook_sizes} and a dedup level, got {level_sizes}."
            )
        check_codes(semantic_ids, level_sizes)
        self.rqvae = rqvae.eval().requires_grad_(False)
        self.semantic_ids = semantic_ids.long()
        self.level_sizes = level_sizes
        self.catalogue = catalogue
        self.language = language
        self.manifest = manifest

    @property
    def num_items(self) -> int:
        """Number of items of the catalogue."""
        return len(self.semantic_ids)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what fixes the meaning of codes: configuration, weights, semantic ids and item keys.

        A model stores it and refuses a tokenizer with another. Titles, categories and notes do not count.
        """
        return _content_hash(self)

    @classmethod
    def fit(
        cls,
        rqvae: RqVae,
        features: FeatureMatrix,
        catalogue: Catalogue,
        *,
        language: str = "text",
        feature_description: Mapping[str, Any],
        dataset_manifest_hash: str,
        dedup_size: int | None = None,
        encoder_dtype: str = "float32",
        metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """Give every item its codes, and a dedup code that separates items with equal codes.

        Args:
            rqvae: trained; it is copied, so later training does not reach the tokenizer.
            features: [N, input_dim], row i of item i; read in blocks, so it may be a memory map.
            catalogue: the N items.
            language: name of the code language.
            feature_description: encoder, model, template and so on, JSON-serialisable; kept in the manifest.
            dataset_manifest_hash: of the prepared dataset; kept in the manifest.
            dedup_size: codes to reserve for the dedup level; by default the power of two that is at least twice what
                these items need, and at least 4. Give an earlier tokenizer's to keep its level sizes.
            encoder_dtype: float32; float16 or bfloat16 run the encoder faster where the device has tensor cores, and
                give another code where two are almost equally near. Kept in the manifest for `encode`.
            metrics: further numbers for manifest and card, such as the reconstruction error.
            provenance: further facts for the manifest, such as the commit.

        Raises:
            InputError: if features are not finite or of another shape, more items share their codes than the
                dedup level can hold, or the encoder's dtype is unknown.
        """
        if features.shape[0] != len(catalogue):
            raise InputError(
                f"SemanticIdTokenizer.fit expected features of {len(catalogue)} catalogue items, got "
                f"{features.shape[0]} rows. Rebuild the item features for this dataset."
            )
        frozen = copy.deepcopy(rqvae).float().eval().requires_grad_(False)
        codes = assign_codes(frozen, features, encoder_dtype=_encoder_dtype(encoder_dtype)).cpu()
        health = codebook_health(codes, rqvae.config.codebook_sizes)
        dedup = dedup_codes(codes)
        dedup_size = dedup_capacity(int(dedup.max()) + 1) if dedup_size is None else dedup_size
        check_dedup_capacity(dedup, dedup_size)
        manifest = {
            "features": dict(feature_description),
            "dataset_manifest_hash": dataset_manifest_hash,
            "metrics": {**health.as_metrics(), **(metrics or {})},
            "provenance": dict(provenance or {}),
            "encoder_dtype": encoder_dtype,
        }
        semantic_ids = torch.cat([codes, dedup[:, None]], dim=1)
        level_sizes = (*rqvae.config.codebook_sizes, dedup_size)
        return cls(frozen, semantic_ids, level_sizes, catalogue, language=language, manifest=manifest)

    def encode(self, features: FeatureMatrix) -> Tensor:
        """Codes of any items from their features.

        Args:
            features: [M, input_dim]; read in blocks, so it may be a memory map.

        Returns:
            [M, L - 1] int64 on the CPU, without dedup code; the same for an item whatever rows surround it, and under
            autocast.

        Raises:
            InputError: if features are not finite or of another width.
        """
        encoder_dtype = _encoder_dtype(self.manifest.get("encoder_dtype", "float32"))
        return assign_codes(self.rqvae, features, encoder_dtype=encoder_dtype).cpu()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artifact, whole or not at all; an older tokenizer artifact at that place is replaced.

        Raises:
            InputError: if something else is there, or the place cannot be written.
        """
        write_artifact(Path(folder), KIND, self._write)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the artifact to a Hub repository, created when missing; returns the commit's address.

        Raises:
            InputError: if the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "tokenizer"
            self.save_pretrained(folder)
            return upload_folder(folder, repo_id, private=private, message="Upload semantic-id tokenizer")

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, revision: str | None = None) -> "SemanticIdTokenizer":
        """Read an artifact from a folder or a Hub repository, verified file by file.

        Args:
            folder_or_hub_id: path of a folder, or "owner/name" on the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            InputError: if it is missing, damaged, of a newer format, or not a tokenizer artifact.
        """
        folder = resolve_folder(folder_or_hub_id, revision=revision)
        if has_older_layout(folder):
            raise InputError(
                f"{folder} holds an RQ-VAE of the older layout, which has weights but no semantic ids. Compute them "
                "from item features: SemanticIdTokenizer.fit(load_legacy(path), features, ...)."
            )
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, ["config.json"])
        language, settings = _only_language(folder, read_json(folder / "config.json"))
        names = _file_names(language)
        verify_files(folder, manifest, names.values())
        try:
            rqvae = RqVae(RqVaeConfig.from_dict(settings["rqvae"]))
            rqvae.load_state_dict(read_safetensors(folder / names["quantizer"]))
            semantic_ids = read_safetensors(folder / names["semantic_ids"])["semantic_ids"]
            tokenizer = cls(
                rqvae,
                semantic_ids,
                tuple(settings["level_sizes"]),
                Catalogue.load(folder / names["catalogue"]),
                language=language,
                manifest={key: value for key, value in manifest.items() if key not in _WRITTEN_FIELDS},
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{folder} contradicts itself ({error}). Copy or build the artifact again.") from error
        if tokenizer.content_hash != manifest.get("content_hash"):
            raise InputError(f"{folder} does not have the content hash of its manifest. Copy the artifact again.")
        return tokenizer

    def _write(self, folder: Path) -> None:
        names = _file_names(self.language)
        for name in names.values():
            (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / names["config"], self._config())
        save_file(_state(self.rqvae), folder / names["quantizer"])
        save_file({"semantic_ids": self.semantic_ids.int()}, folder / names["semantic_ids"])
        self.catalogue.save(folder / names["catalogue"])
        manifest = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "content_hash": self.content_hash,
            "files": file_hashes(folder, names.values()),
            **self.manifest,
        }
        write_json(folder / MANIFEST, manifest)
        health = codebook_health(self.semantic_ids[:, :-1], self.level_sizes[:-1])
        (folder / "README.md").write_text(model_card(self._config(), self.manifest, health), encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        settings = {"level_sizes": list(self.level_sizes), "rqvae": self.rqvae.config.to_dict()}
        return {"languages": {self.language: settings}}


_WRITTEN_FIELDS = ("kind", "format_version", "content_hash", "files")


def _file_names(language: str) -> dict[str, str]:
    return {
        "config": "config.json",
        "quantizer": f"quantizers/{language}.safetensors",
        "semantic_ids": f"semantic_ids/{language}.safetensors",
        "catalogue": "catalogue.safetensors",
    }


def _only_language(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    languages = config.get("languages")
    if (
        not isinstance(languages, dict)
        or len(languages) != 1
        or not all(isinstance(s, dict) for s in languages.values())
    ):
        raise InputError(f"{folder / 'config.json'} expected one code language under 'languages', got {languages!r}.")
    return next(iter(languages.items()))


def _encoder_dtype(name: str) -> torch.dtype:
    if name not in _ENCODER_DTYPES:
        raise InputError(f"encoder_dtype expected one of {', '.join(_ENCODER_DTYPES)}, got {name!r}.")
    return _ENCODER_DTYPES[name]


def _state(rqvae: RqVae) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in rqvae.state_dict().items()}


def _content_hash(tokenizer: SemanticIdTokenizer) -> str:
    digest = hashlib.sha256(json.dumps(tokenizer._config(), sort_keys=True).encode())
    digest.update(json.dumps(tokenizer.catalogue.item_keys).encode())
    tensors = {**_state(tokenizer.rqvae), "semantic_ids": tokenizer.semantic_ids}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
