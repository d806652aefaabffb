"""The frozen tokenizer: items as tuples of codes, and the artifact that keeps them."""

import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.schemas import Catalogue, InputError, read_safetensors
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer import living
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
    CodebookHealth,
    check_codes,
    check_dedup_capacity,
    codebook_health,
    dedup_capacity,
    dedup_codes,
)
from modules.tokenizer.content_hash import content_hash
from modules.tokenizer.hub import resolve_folder, upload_folder
from modules.tokenizer.layout import CONFIG, check_versions, file_names, only_language
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
        manifest: where features, data and codes came from, and which versions of the catalogue came before.
        available: [N] bool on the CPU, false for items that were removed; None where none was.
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
        available: Tensor | None = None,
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
        self.available = living.checked_flags(available, len(semantic_ids))

    @property
    def num_items(self) -> int:
        """Number of rows, those of removed items included."""
        return len(self.semantic_ids)

    @property
    def num_available(self) -> int:
        """Number of items that are not removed."""
        return self.num_items if self.available is None else int(self.available.sum())

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what fixes the meaning of codes: configuration, weights, semantic ids and item keys.

        A model stores it and refuses a tokenizer that neither has it nor comes from one that had it. Which items were
        removed counts; titles, categories and notes do not.
        """
        return content_hash(self._config(), self.catalogue.item_keys, {**_state(self.rqvae), **self._ids()})

    @property
    def catalogue_version(self) -> int:
        """1 as fitted, then one more with every change of the catalogue."""
        return self.manifest.get("catalogue_version", 1)

    @property
    def lineage(self) -> tuple[str, ...]:
        """Content hashes of the earlier versions, oldest first."""
        return tuple(self.manifest.get("lineage", ()))

    def is_version_of(self, content_hash: str) -> bool:
        """Whether this is the tokenizer of a content hash, or one whose catalogue has changed since."""
        return content_hash in self.lineage or content_hash == self.content_hash

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

    def encode(self, features: FeatureMatrix, *, item_keys: Sequence[str] | None = None) -> Tensor:
        """Codes of any items from their features.

        Args:
            features: [M, input_dim]; read in blocks, so it may be a memory map.
            item_keys: of the items, to be named in errors.

        Returns:
            [M, L - 1] int64 on the CPU, without dedup code; the same for an item whatever rows surround it, and under
            autocast.

        Raises:
            InputError: if features are not finite or of another width.
        """
        encoder_dtype = _encoder_dtype(self.manifest.get("encoder_dtype", "float32"))
        return assign_codes(self.rqvae, features, encoder_dtype=encoder_dtype, item_keys=item_keys).cpu()

    def with_items(
        self,
        item_keys: Sequence[str],
        features: FeatureMatrix,
        *,
        titles: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        feature_description: Mapping[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """The tokenizer with items added; this one stays as it is, and so do ids and codes of the items it has.

        Items that were removed come back with their old id and codes, whatever their features; others are appended in
        the order given, cold, with the codes that the frozen RQ-VAE gives them and the next free dedup code.

        Args:
            item_keys: of M items, distinct; none means no change.
            features: [M, input_dim], made as those that the tokenizer was fitted on. Those of an encoder that is fitted
                on its catalogue (tfidf_svd) have to come from that very fit.
            titles: of the M items; None leaves new ones without, and those that come back as they were.
            categories: the same.
            feature_description: of the features, to be compared with the manifest's where both state a setting.

        Raises:
            InputError: if a key is repeated, empty or that of an item which is there, features are not finite, of
                another shape or encoder, texts are not one per item, or a tuple of codes has no free dedup code.
        """
        keys = living.checked_keys(item_keys)
        titles = living.checked_column("titles", titles, len(keys))
        categories = living.checked_column("categories", categories, len(keys))
        if not keys:
            return self
        living.check_same_encoder(self.manifest.get("features", {}), feature_description)
        rows = living.rows_of(keys, self.catalogue)
        living.check_can_join(keys, rows, self.available)
        living.check_shape(features.shape, len(keys), self.rqvae.config.input_dim)
        codes = self.encode(features, item_keys=keys)
        is_new = rows == living.NEW
        new_keys = [keys[place] for place in is_new.nonzero()[:, 0].tolist()]
        semantic_ids = living.grown_ids(self.semantic_ids, codes[is_new], new_keys, self.level_sizes)
        catalogue = living.grown_catalogue(self.catalogue, keys, rows, titles, categories)
        available = living.with_flags(self.available, len(semantic_ids), rows[~is_new], value=True)
        return self._changed(semantic_ids, catalogue, available)

    def without_items(self, item_keys: Sequence[str]) -> "SemanticIdTokenizer":
        """The tokenizer with items removed: they keep row, id and codes, and `available` is false for them.

        Histories may go on naming them.

        Args:
            item_keys: distinct; none means no change.

        Raises:
            InputError: if a key is repeated, unknown or that of an item removed already, or no item would be left.
        """
        keys = living.checked_keys(item_keys)
        if not keys:
            return self
        rows = living.rows_of(keys, self.catalogue)
        living.check_can_leave(keys, rows, self.available)
        available = living.with_flags(self.available, self.num_items, rows, value=False)
        return self._changed(self.semantic_ids, self.catalogue, available)

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
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, [CONFIG])
        check_versions(folder / MANIFEST, manifest)
        language, settings = only_language(folder, read_json(folder / CONFIG))
        names = file_names(language)
        verify_files(folder, manifest, names.values())
        try:
            rqvae = RqVae(RqVaeConfig.from_dict(settings["rqvae"]))
            rqvae.load_state_dict(read_safetensors(folder / names["quantizer"]))
            ids = read_safetensors(folder / names["semantic_ids"])
            tokenizer = cls(
                rqvae,
                ids["semantic_ids"],
                tuple(settings["level_sizes"]),
                Catalogue.load(folder / names["catalogue"]),
                language=language,
                manifest={key: value for key, value in manifest.items() if key not in _WRITTEN_FIELDS},
                available=ids.get("available"),
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{folder} contradicts itself ({error}). Copy or build the artifact again.") from error
        if tokenizer.content_hash != manifest.get("content_hash"):
            raise InputError(f"{folder} does not have the content hash of its manifest. Copy the artifact again.")
        return tokenizer

    def _write(self, folder: Path) -> None:
        health = codebook_health(self.semantic_ids[:, :-1], self.level_sizes[:-1])
        described = self._described(health)
        names = file_names(self.language)
        for name in names.values():
            (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / names["config"], self._config())
        save_file(_state(self.rqvae), folder / names["quantizer"])
        save_file({**self._ids(), "semantic_ids": self.semantic_ids.int()}, folder / names["semantic_ids"])
        self.catalogue.save(folder / names["catalogue"])
        manifest = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "content_hash": self.content_hash,
            "files": file_hashes(folder, names.values()),
            **described,
        }
        write_json(folder / MANIFEST, manifest)
        (folder / "README.md").write_text(
            model_card(self._config(), described, health, num_removed=self.num_items - self.num_available),
            encoding="utf-8",
        )

    def _changed(self, semantic_ids: Tensor, catalogue: Catalogue, available: Tensor | None) -> "SemanticIdTokenizer":
        """The next version of the catalogue."""
        versions = {"catalogue_version": self.catalogue_version + 1, "lineage": [*self.lineage, self.content_hash]}
        return SemanticIdTokenizer(
            self.rqvae,
            semantic_ids,
            self.level_sizes,
            catalogue,
            language=self.language,
            manifest={**self.manifest, **versions},
            available=available,
        )

    def _ids(self) -> dict[str, Tensor]:
        """Semantic ids and, where items were removed, which."""
        removed = {} if self.available is None else {"available": self.available}
        return {"semantic_ids": self.semantic_ids, **removed}

    def _described(self, health: CodebookHealth) -> dict[str, Any]:
        """The manifest with the numbers of the catalogue as it is now."""
        if self.catalogue_version == 1:
            return self.manifest
        return {**self.manifest, "metrics": {**self.manifest.get("metrics", {}), **health.as_metrics()}}

    def _config(self) -> dict[str, Any]:
        settings = {"level_sizes": list(self.level_sizes), "rqvae": self.rqvae.config.to_dict()}
        return {"languages": {self.language: settings}}


_WRITTEN_FIELDS = ("kind", "format_version", "content_hash", "files")


def _encoder_dtype(name: str) -> torch.dtype:
    if name not in _ENCODER_DTYPES:
        raise InputError(f"encoder_dtype expected one of {', '.join(_ENCODER_DTYPES)}, got {name!r}.")
    return _ENCODER_DTYPES[name]


def _state(rqvae: RqVae) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in rqvae.state_dict().items()}
