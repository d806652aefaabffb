"""The frozen tokenizer: items as tuples of codes, and the artifact that keeps them."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schemas import Catalogue, InputError
from modules.feature_rows import FeatureMatrix
from modules.rqvae import RqVae
from modules.tokenizer import living
from modules.tokenizer.assign import assign_codes
from modules.tokenizer.collisions import codebook_health
from modules.tokenizer.frozen_ids import FrozenIds
from modules.tokenizer.hub import resolve_folder, upload_folder
from modules.tokenizer.item_costs import ItemCosts
from modules.tokenizer.nearest_free import Costs
from modules.tokenizer.policies import CollisionPolicy, first_ids, joining_ids, metrics_of_ids
from modules.tokenizer.stored import naming, read_tokenizer, write_tokenizer

_ENCODER_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SemanticIdTokenizer(FrozenIds):
    """Items of a catalogue as semantic ids, and the RQ-VAE that gives new features their codes.

    `FrozenIds` lists the attributes.
    """

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
        collisions: CollisionPolicy = CollisionPolicy.DEDUP_CODE,
        dedup_size: int | None = None,
        encoder_dtype: str = "float32",
        metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """Give every item its codes, and do with items of equal codes what the collision policy says.

        Args:
            rqvae: trained; it is copied, so later training does not reach the tokenizer.
            features: [N, input_dim], row i of item i; read in blocks, so it may be a memory map.
            catalogue: the N items.
            language: name of the code language.
            feature_description: encoder, model, template and so on, JSON-serialisable; kept in the manifest.
            dataset_manifest_hash: of the prepared dataset; kept in the manifest.
            collisions: what becomes of items that share their codes.
            dedup_size: codes to reserve for the dedup level; by default the power of two that is at least twice what
                these items need, and at least 4. Give an earlier tokenizer's to keep its level sizes.
            encoder_dtype: float32; float16 or bfloat16 run the encoder faster where the device has tensor cores, and
                give another code where two are almost equally near. Kept in the manifest for `encode`.
            metrics: further numbers for manifest and card, such as the reconstruction error.
            provenance: further facts for the manifest, such as the commit.

        Raises:
            InputError: if features are not finite or of another shape, more items share their codes than the
                dedup level can hold, there are more items than free ids, or the encoder's dtype is unknown.
        """
        if features.shape[0] != len(catalogue):
            raise InputError(
                f"SemanticIdTokenizer.fit expected features of {len(catalogue)} catalogue items, got "
                f"{features.shape[0]} rows. Rebuild the item features for this dataset."
            )
        frozen = copy.deepcopy(rqvae).float().eval().requires_grad_(False)
        dtype = _encoder_dtype(encoder_dtype)
        codes = assign_codes(frozen, features, encoder_dtype=dtype).cpu()
        sizes = rqvae.config.codebook_sizes
        costs_of = partial(ItemCosts, frozen, features, encoder_dtype=dtype)
        semantic_ids, level_sizes = first_ids(collisions, codes, sizes, costs_of=costs_of, dedup_size=dedup_size)
        manifest = {
            "features": dict(feature_description),
            "dataset_manifest_hash": dataset_manifest_hash,
            "metrics": {
                **codebook_health(codes, sizes).as_metrics(),
                **metrics_of_ids(collisions, semantic_ids, codes),
                **(metrics or {}),
            },
            "provenance": dict(provenance or {}),
            "encoder_dtype": encoder_dtype,
        }
        return cls(
            frozen,
            semantic_ids,
            level_sizes,
            catalogue,
            language=language,
            manifest=manifest,
            collision_policy=collisions,
            nearest_codes=codes if collisions is CollisionPolicy.NEAREST_FREE else None,
        )

    @classmethod
    def from_ids(
        cls,
        codes: Tensor,
        codebook_sizes: Sequence[int],
        catalogue: Catalogue,
        *,
        language: str = "text",
        collisions: CollisionPolicy = CollisionPolicy.DEDUP_CODE,
        manifest: Mapping[str, Any] | None = None,
    ) -> "SemanticIdTokenizer":
        """A tokenizer of codes that come from elsewhere, without a quantizer: its catalogue can shrink, not grow.

        Args:
            codes: [N, L] integers, row i of item i.
            codebook_sizes: codes per level.
            catalogue: the N items.
            language: name of the code language.
            collisions: DEDUP_CODE or NONE.
            manifest: where the codes came from; metrics are added to it.

        Raises:
            InputError: if codes do not fit the sizes or the catalogue, or the policy needs a quantizer's distances.
        """
        sizes = tuple(codebook_sizes)
        health = codebook_health(codes, sizes)
        codes = codes.long().cpu()
        semantic_ids, level_sizes = first_ids(collisions, codes, sizes)
        given = dict(manifest or {})
        metrics = {
            **health.as_metrics(),
            **metrics_of_ids(collisions, semantic_ids, codes),
            **given.get("metrics", {}),
        }
        return cls(
            None,
            semantic_ids,
            level_sizes,
            catalogue,
            language=language,
            manifest={"features": {}, **given, "metrics": metrics},
            collision_policy=collisions,
        )

    def quantizer(self, purpose: str) -> RqVae:
        """The RQ-VAE.

        Args:
            purpose: what it is needed for, as the error says it.

        Raises:
            InputError: if the ids were imported without one.
        """
        if self.rqvae is None:
            raise InputError(
                f"{purpose} needs a quantizer, and the ids of this {self.language!r} tokenizer were imported without "
                "one. Fit a tokenizer on item features instead."
            )
        return self.rqvae

    def encode(self, features: FeatureMatrix, *, item_keys: Sequence[str] | None = None) -> Tensor:
        """Codes of any items from their features.

        Args:
            features: [M, input_dim]; read in blocks, so it may be a memory map.
            item_keys: of the items, to be named in errors.

        Returns:
            [M, num_codebooks] int64 on the CPU, the nearest codes whatever the collision policy; the same for an item
            whatever rows surround it, and under autocast.

        Raises:
            InputError: if features are not finite or of another width, or the tokenizer has no quantizer.
        """
        rqvae = self.quantizer("encode")
        return assign_codes(rqvae, features, encoder_dtype=self._dtype(), item_keys=item_keys).cpu()

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
        the order given, cold, with the codes that the frozen RQ-VAE gives them and the next free dedup code. Under
        NEAREST_FREE they take, one by one, the nearest free codes.

        Args:
            item_keys: of M items, distinct; none means no change.
            features: [M, input_dim], made as those that the tokenizer was fitted on. Those of an encoder that is fitted
                on its catalogue (tfidf_svd) have to come from that very fit.
            titles: of the M items; None leaves new ones without, and those that come back as they were.
            categories: the same.
            feature_description: of the features, to be compared with the manifest's where both state a setting.

        Raises:
            InputError: if a key is repeated, empty or that of an item which is there, features are not finite, of
                another shape or encoder, texts are not one per item, a tuple of codes has no free dedup code, no id is
                free, or the tokenizer has no quantizer.
        """
        keys = living.checked_keys(item_keys)
        titles = living.checked_column("titles", titles, len(keys))
        categories = living.checked_column("categories", categories, len(keys))
        if not keys:
            return self
        living.check_same_encoder(self.manifest.get("features", {}), feature_description)
        rows = living.rows_of(keys, self.catalogue)
        living.check_can_join(keys, rows, self.available)
        is_new = rows == living.NEW
        if self.rqvae is None and not bool(is_new.any()):
            semantic_ids, nearest_codes = self.semantic_ids, self.nearest_codes
        else:
            semantic_ids, nearest_codes = self._grown(keys, features, is_new)
        catalogue = living.grown_catalogue(self.catalogue, keys, rows, titles, categories)
        available = living.with_flags(self.available, len(semantic_ids), rows[~is_new], value=True)
        return self._changed(semantic_ids, nearest_codes, catalogue, available)

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
        return self._changed(self.semantic_ids, self.nearest_codes, self.catalogue, available)

    def without_texts(self, **facts: str) -> "SemanticIdTokenizer":
        """The tokenizer without the items' titles and categories, which may not be another's to publish.

        Ids, content hash and version stay, so that models trained with either take both.

        Args:
            facts: for the manifest's provenance, such as the command that trained it.
        """
        catalogue = replace(self.catalogue, titles=[""] * self.num_items, categories=[""] * self.num_items)
        provenance = {**self.manifest.get("provenance", {}), **facts}
        return self._copy(catalogue=catalogue, manifest={**self.manifest, "provenance": provenance})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artifact, whole or not at all; an older tokenizer artifact at that place is replaced.

        Raises:
            InputError: if something else is there, or the place cannot be written.
        """
        write_tokenizer(Path(folder), self)

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
        try:
            arguments, content_hash = read_tokenizer(folder)
            with naming(folder):
                tokenizer = cls(**arguments)
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{folder} contradicts itself ({error}). Copy or build the artifact again.") from error
        if tokenizer.content_hash != content_hash:
            raise InputError(f"{folder} does not have the content hash of its manifest. Copy the artifact again.")
        return tokenizer

    def _grown(self, keys: list[str], features: FeatureMatrix, is_new: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic ids and nearest codes with rows appended for those items that are new."""
        rqvae = self.quantizer("with_items")
        living.check_shape(features.shape, len(keys), rqvae.config.input_dim)
        new = is_new.nonzero()[:, 0]
        codes = self.encode(features, item_keys=keys)[new]
        new_keys = [keys[place] for place in new.tolist()]

        def costs_of(places: Tensor) -> Costs:
            costs = ItemCosts(rqvae, features, new[places], encoder_dtype=self._dtype())
            return lambda places, codes, level: costs(new[places], codes, level)

        policy, sizes = self.collision_policy, self.level_sizes
        ids = joining_ids(policy, self.semantic_ids, codes, new_keys, sizes, costs_of)
        return torch.cat([self.semantic_ids, ids]), torch.cat([self.nearest_codes, codes])

    def _changed(
        self, semantic_ids: Tensor, nearest_codes: Tensor, catalogue: Catalogue, available: Tensor | None
    ) -> "SemanticIdTokenizer":
        """The next version of the catalogue."""
        versions = {"catalogue_version": self.catalogue_version + 1, "lineage": [*self.lineage, self.content_hash]}
        return self._copy(
            semantic_ids=semantic_ids,
            catalogue=catalogue,
            manifest={**self.manifest, **versions},
            available=available,
            nearest_codes=nearest_codes,
        )

    def _copy(self, **changes: Any) -> "SemanticIdTokenizer":
        """The same tokenizer with other values of some arguments of the constructor."""
        arguments: dict[str, Any] = {
            "rqvae": self.rqvae,
            "semantic_ids": self.semantic_ids,
            "level_sizes": self.level_sizes,
            "catalogue": self.catalogue,
            "language": self.language,
            "manifest": self.manifest,
            "available": self.available,
            "collision_policy": self.collision_policy,
            "nearest_codes": self.nearest_codes,
        } | changes
        if self.collision_policy is not CollisionPolicy.NEAREST_FREE:
            arguments["nearest_codes"] = None  # they are those of the ids
        return SemanticIdTokenizer(**arguments)

    def _dtype(self) -> torch.dtype:
        return _encoder_dtype(self.manifest.get("encoder_dtype", "float32"))


def _encoder_dtype(name: str) -> torch.dtype:
    if name not in _ENCODER_DTYPES:
        raise InputError(f"encoder_dtype expected one of {', '.join(_ENCODER_DTYPES)}, got {name!r}.")
    return _ENCODER_DTYPES[name]
