"""Semantic ids of a catalogue, and what fixes their meaning."""

import re
from functools import cached_property
from typing import Any

from torch import Tensor

from data.schemas import Catalogue, InputError
from modules.rqvae import RqVae
from modules.tokenizer import living
from modules.tokenizer.collisions import check_codes, codebook_health, collision_groups
from modules.tokenizer.content_hash import content_hash
from modules.tokenizer.policies import CollisionPolicy, metrics_of_ids

_LANGUAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class FrozenIds:
    """Items of a catalogue as semantic ids, and the RQ-VAE that they come from.

    Nothing in it trains: the RQ-VAE is in evaluation mode and without gradients.

    Attributes:
        rqvae: the frozen RQ-VAE; None where ids were imported without one.
        semantic_ids: [N, L] int64 on the CPU; under DEDUP_CODE the last column is the dedup code.
        level_sizes: codes per level; under DEDUP_CODE the last is what is reserved for the dedup level.
        catalogue: the items, in the order of the rows.
        language: name of the code language.
        manifest: where features, data and codes came from, and which versions of the catalogue came before.
        available: [N] bool on the CPU, false for items that were removed; None where none was.
        collision_policy: what became of items that the quantizer gave the same codes.
        nearest_codes: [N, num_codebooks] int64, what the quantizer gave the items before that; the constructor wants
            them under NEAREST_FREE, whose ids do not tell them.
    """

    def __init__(
        self,
        rqvae: RqVae | None,
        semantic_ids: Tensor,
        level_sizes: tuple[int, ...],
        catalogue: Catalogue,
        *,
        language: str,
        manifest: dict[str, Any],
        available: Tensor | None = None,
        collision_policy: CollisionPolicy = CollisionPolicy.DEDUP_CODE,
        nearest_codes: Tensor | None = None,
    ) -> None:
        if not _LANGUAGE_NAME.fullmatch(language):
            raise InputError(f"language expected lower-case letters, digits and underscores, got {language!r}.")
        if len(semantic_ids) != len(catalogue):
            raise InputError(f"expected semantic ids of {len(catalogue)} catalogue items, got {len(semantic_ids)}.")
        self.rqvae = None if rqvae is None else rqvae.eval().requires_grad_(False)
        self.semantic_ids = semantic_ids.long()
        self.level_sizes = level_sizes
        self.catalogue = catalogue
        self.language = language
        self.manifest = manifest
        self.collision_policy = collision_policy
        self._check_levels()
        self.available = living.checked_flags(available, len(semantic_ids))
        self.nearest_codes = self._checked_nearest_codes(nearest_codes)

    @property
    def num_items(self) -> int:
        """Number of rows, those of removed items included."""
        return len(self.semantic_ids)

    @property
    def num_available(self) -> int:
        """Number of items that are not removed."""
        return self.num_items if self.available is None else int(self.available.sum())

    @property
    def num_codebooks(self) -> int:
        """Levels of the quantizer; the dedup level is none of them."""
        return len(self.level_sizes) - self.collision_policy.num_added_levels

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level of the quantizer."""
        return self.level_sizes[: self.num_codebooks]

    @property
    def codes(self) -> Tensor:
        """[N, num_codebooks] int64 the semantic ids without dedup code."""
        return self.semantic_ids[:, : self.num_codebooks]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what fixes the meaning of codes: configuration, weights, semantic ids and item keys.

        A model stores it and refuses a tokenizer that neither has it nor comes from one that had it. Which items were
        removed counts; titles, categories and notes do not.
        """
        settings = self.settings()
        if self.collision_policy is CollisionPolicy.DEDUP_CODE:
            del settings["collision_policy"]  # artifacts of format 1, which knew no other policy, keep their hash
        config = {"languages": {self.language: settings}}
        return content_hash(config, self.catalogue.item_keys, {**self.weights(), **self.ids()})

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

    def collisions(self) -> list[list[int]]:
        """Item ids, removed ones included, of every semantic id that several items share.

        Returns:
            groups, the largest first and equally large ones in the order of their codes; none but under NONE.
        """
        return collision_groups(self.semantic_ids)

    def settings(self) -> dict[str, Any]:
        """What config.json says of the language."""
        settings = {"level_sizes": list(self.level_sizes), "collision_policy": self.collision_policy.value}
        return settings if self.rqvae is None else {**settings, "rqvae": self.rqvae.config.to_dict()}

    def weights(self) -> dict[str, Tensor]:
        """State of the RQ-VAE on the CPU; empty without one."""
        if self.rqvae is None:
            return {}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.rqvae.state_dict().items()}

    def ids(self) -> dict[str, Tensor]:
        """Semantic ids and, where items were removed, which are not."""
        removed = {} if self.available is None else {"available": self.available}
        return {"semantic_ids": self.semantic_ids, **removed}

    def described(self) -> dict[str, Any]:
        """The manifest with the numbers of the catalogue as it is now."""
        if self.catalogue_version == 1:
            return self.manifest
        metrics = {
            **self.manifest.get("metrics", {}),
            **codebook_health(self.nearest_codes, self.codebook_sizes).as_metrics(),
            **metrics_of_ids(self.collision_policy, self.semantic_ids, self.nearest_codes),
        }
        return {**self.manifest, "metrics": metrics}

    def _check_levels(self) -> None:
        sizes = self.codebook_sizes if self.rqvae is None else self.rqvae.config.codebook_sizes
        if self.codebook_sizes != sizes or not sizes:
            added = " and a dedup level" if self.collision_policy.num_added_levels else ""
            raise InputError(f"expected level sizes {sizes}{added}, got {self.level_sizes}.")
        check_codes(self.semantic_ids, self.level_sizes)

    def _checked_nearest_codes(self, nearest_codes: Tensor | None) -> Tensor:
        if (nearest_codes is not None) != (self.collision_policy is CollisionPolicy.NEAREST_FREE):
            given = "none" if nearest_codes is None else "some"
            raise InputError(
                f"nearest_codes expected under NEAREST_FREE alone, got {given} under {self.collision_policy}."
            )
        if nearest_codes is None:
            return self.codes
        check_codes(nearest_codes, self.codebook_sizes)
        if len(nearest_codes) != self.num_items:
            raise InputError(f"expected nearest codes of {self.num_items} items, got {len(nearest_codes)}.")
        return nearest_codes.long()
