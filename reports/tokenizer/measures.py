"""Every number of a tokenizer's report, measured once: the page shows them and metrics.json holds them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.schemas import InputError
from evaluation.reconstruction import Reconstruction, reconstruct
from evaluation.semantic_ids import (
    NeighbourAgreement,
    Purity,
    neighbour_agreement,
    purity_by_depth,
)
from modules.feature_rows import FeatureMatrix
from modules.tokenizer.collisions import CodebookHealth, codebook_health, collision_groups
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer

MAX_FEATURE_ROWS = 100_000
"""Items whose features are read into memory; of larger catalogues a sample."""

NUM_GROUPS = 30
"""Groups of colliding items that are listed."""

_GROUP_KEYS = 100
_WORST_ITEMS = 8
_HISTOGRAM_BINS, _HISTOGRAM_END = 48, 0.995


@dataclass(frozen=True, kw_only=True)
class Group:
    """Items that the quantizer gave the same codes.

    Attributes:
        codes: which.
        item_ids: ascending.
        num_distinct_features: different rows of features among them; None where features are not at hand.
    """

    codes: tuple[int, ...]
    item_ids: tuple[int, ...]
    num_distinct_features: int | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values in bins of equal width from low to high; the last bin also holds what is larger."""

    low: float
    high: float
    median: float
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureMeasures:
    """What needs the features.

    Attributes:
        rows: [S] int64 item ids whose features were read, ascending: all, or a sample.
        values: [S, D] fp32, their features.
        num_distinct: different rows among them.
        reproduced: share of the rows whose nearest codes come out of the quantizer again; None without quantizer.
        agreement: of neighbours; None for a single item.
        reconstruction: from the codes as stored; None without quantizer.
        error_histogram: of the items' reconstruction errors; None without quantizer.
        worst: item ids and errors of the worst reconstructed items, worst first; empty without quantizer.
        nearest_error: mean reconstruction error from the nearest codes, before the policy moved items; None where it
            moves none.
    """

    rows: Tensor
    values: Tensor
    num_distinct: int
    reproduced: float | None
    agreement: NeighbourAgreement | None
    reconstruction: Reconstruction | None
    error_histogram: Histogram | None
    worst: tuple[tuple[int, float], ...]
    nearest_error: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Measures:
    """A tokenizer in numbers.

    Attributes:
        num_items: N.
        num_removed: of these.
        language: code language.
        has_quantizer: false for ids that were imported.
        policy: how collisions are resolved.
        codebook_sizes: codes per level, without dedup level.
        nearest: health of the nearest codes, before the policy.
        final: health of the semantic ids after it, dedup code included.
        num_moved: items that the policy gave other codes than the nearest.
        dedup_capacity: codes of the dedup level; None without one.
        code_counts: items per code of every level, largest first, before the policy.
        num_groups: tuples that several items share.
        groups: the largest of them.
        purity: of prefixes against categories, by depth; empty where no item has a category.
        num_categories: different categories.
        features: None where none are given.
    """

    num_items: int
    num_removed: int
    language: str
    has_quantizer: bool
    policy: CollisionPolicy
    codebook_sizes: tuple[int, ...]
    nearest: CodebookHealth
    final: CodebookHealth
    num_moved: int
    dedup_capacity: int | None
    code_counts: tuple[tuple[int, ...], ...]
    num_groups: int
    groups: tuple[Group, ...]
    purity: tuple[Purity, ...]
    num_categories: int
    features: FeatureMeasures | None

    @property
    def ceiling(self) -> float | None:
        """Largest unique ratio that ids of these features can have; None where not all features were read."""
        if self.features is None or len(self.features.rows) < self.num_items:
            return None
        return self.features.num_distinct / self.num_items

    def as_json(self, tokenizer: SemanticIdTokenizer) -> dict[str, Any]:
        """The numbers as JSON can hold them; items by their keys."""
        keys = tokenizer.catalogue.item_keys
        return {
            "num_items": self.num_items,
            "num_removed": self.num_removed,
            "language": self.language,
            "has_quantizer": self.has_quantizer,
            "collision_policy": self.policy.value,
            "codebook_sizes": list(self.codebook_sizes),
            "before_policy": _health_json(self.nearest),
            "after_policy": {
                **_health_json(self.final),
                "num_moved": self.num_moved,
                "dedup_capacity": self.dedup_capacity,
            },
            "unique_ratio_ceiling": self.ceiling,
            "code_counts": [list(counts) for counts in self.code_counts],
            "num_groups": self.num_groups,
            "groups": [
                {
                    "codes": list(group.codes),
                    "num_items": len(group.item_ids),
                    "item_keys": [keys[item] for item in group.item_ids[:_GROUP_KEYS]],
                    "num_distinct_features": group.num_distinct_features,
                }
                for group in self.groups
            ],
            "prefix_purity": [asdict(purity) for purity in self.purity],
            "num_categories": self.num_categories,
            "features": None if self.features is None else _features_json(self.features, keys),
        }


def measure(
    tokenizer: SemanticIdTokenizer,
    features: FeatureMatrix | None,
    *,
    categories: Sequence[str] | None = None,
    max_feature_rows: int = MAX_FEATURE_ROWS,
    seed: int = 0,
) -> Measures:
    """Measure a tokenizer.

    Args:
        tokenizer: of N items.
        features: [N, input_dim] that its ids were made from; None leaves out what needs them.
        categories: of the N items, for purity; None takes the catalogue's.
        max_feature_rows: features that are read; of more items a random sample.
        seed: of the samples.

    Raises:
        InputError: if features or categories are not one per item, or features are not finite.
    """
    codes, nearest, num_items = tokenizer.codes, tokenizer.nearest_codes, tokenizer.num_items
    categories = tokenizer.catalogue.categories if categories is None else categories
    rows, values = _read(tokenizer, features, max_feature_rows, seed)
    sizes = tokenizer.codebook_sizes
    groups, num_groups = _groups(nearest, values if len(rows) == num_items else None)
    has_dedup = tokenizer.semantic_ids.shape[1] > tokenizer.num_codebooks
    return Measures(
        num_items=num_items,
        num_removed=num_items - tokenizer.num_available,
        language=tokenizer.language,
        has_quantizer=tokenizer.rqvae is not None,
        policy=tokenizer.collision_policy,
        codebook_sizes=sizes,
        nearest=codebook_health(nearest, sizes),
        final=codebook_health(tokenizer.semantic_ids, tokenizer.level_sizes),
        num_moved=int((nearest != codes).any(dim=1).sum()),
        dedup_capacity=tokenizer.level_sizes[-1] if has_dedup else None,
        code_counts=_code_counts(nearest, sizes),
        num_groups=num_groups,
        groups=groups,
        purity=tuple(purity_by_depth(codes, categories)) if any(categories) else (),
        num_categories=len(set(categories) - {""}),
        features=None if values is None else _measure_features(tokenizer, rows, values, seed),
    )


def _read(
    tokenizer: SemanticIdTokenizer, features: FeatureMatrix | None, max_rows: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Item ids whose features are read [S], and these [S, D] fp32."""
    num_items = tokenizer.num_items
    if features is None:
        return torch.empty(0, dtype=torch.int64), None
    width = "D" if tokenizer.rqvae is None else tokenizer.rqvae.config.input_dim
    fits = len(features.shape) == 2 and features.shape[0] == num_items and width in ("D", features.shape[1])
    if not fits:
        raise InputError(
            f"a report on {num_items} items expected features of shape [{num_items}, {width}], got "
            f"{list(features.shape)}. Give those that the tokenizer was fitted on, with one row per item."
        )
    if num_items <= max_rows:
        rows = torch.arange(num_items)
        values = _to_float(features[0:num_items])
    else:
        rows = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values
        values = torch.cat([_to_float(features[row : row + 1]) for row in rows.tolist()])
    bad = (~values.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        item = int(rows[bad[0]])
        raise InputError(
            f"item features expected finite values, got NaN or infinity in row {item} (item "
            f"{tokenizer.catalogue.item_keys[item]!r}). Rebuild the item features."
        )
    return rows, values


def _to_float(block: Any) -> Tensor:
    if isinstance(block, Tensor):
        return block.detach().float().cpu()
    return torch.from_numpy(np.array(block, dtype=np.float32))


def _measure_features(tokenizer: SemanticIdTokenizer, rows: Tensor, values: Tensor, seed: int) -> FeatureMeasures:
    codes, nearest = tokenizer.codes[rows], tokenizer.nearest_codes[rows]
    reproduced, reconstruction, nearest_error = None, None, None
    if tokenizer.rqvae is not None:
        reproduced = float((tokenizer.encode(values) == nearest).all(dim=1).double().mean())
        reconstruction = reconstruct(tokenizer.rqvae, values, codes)
        if not torch.equal(codes, nearest):
            nearest_error = reconstruct(tokenizer.rqvae, values, nearest).error
    return FeatureMeasures(
        rows=rows,
        values=values,
        num_distinct=len(set(_row_hashes(values))),
        reproduced=reproduced,
        agreement=neighbour_agreement(values, codes, seed=seed) if len(rows) > 1 else None,
        reconstruction=reconstruction,
        error_histogram=None if reconstruction is None else _histogram(reconstruction.errors),
        worst=() if reconstruction is None else _worst(rows, reconstruction.errors),
        nearest_error=nearest_error,
    )


def _histogram(errors: Tensor) -> Histogram:
    values = errors.double().numpy()
    low, high = float(values.min()), float(np.quantile(values, _HISTOGRAM_END))
    counts = np.histogram(values.clip(max=high), bins=_HISTOGRAM_BINS, range=(low, max(high, low)))[0]
    return Histogram(low=low, high=high, median=float(np.median(values)), counts=tuple(counts.tolist()))


def _worst(rows: Tensor, errors: Tensor) -> tuple[tuple[int, float], ...]:
    found = errors.topk(min(_WORST_ITEMS, len(errors)))
    return tuple(zip(rows[found.indices].tolist(), found.values.tolist(), strict=True))


def _groups(codes: Tensor, values: Tensor | None) -> tuple[tuple[Group, ...], int]:
    """The largest groups of equal codes, equally large ones in the order of their codes, and how many there are."""
    groups = collision_groups(codes)
    largest = tuple(
        Group(
            codes=tuple(codes[item_ids[0]].tolist()),
            item_ids=tuple(item_ids),
            num_distinct_features=None if values is None else len(set(_row_hashes(values[item_ids]))),
        )
        for item_ids in groups[:NUM_GROUPS]
    )
    return largest, len(groups)


def _row_hashes(values: Tensor) -> list[int]:
    return [hash(row.tobytes()) for row in (values + 0.0).numpy()]  # -0.0 + 0.0 is 0.0


def _code_counts(codes: Tensor, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    counts = [torch.bincount(codes[:, level], minlength=size) for level, size in enumerate(sizes)]
    return tuple(tuple(count.sort(descending=True).values.tolist()) for count in counts)


def _health_json(health: CodebookHealth) -> dict[str, Any]:
    return {
        "num_used": list(health.num_used),
        "use": list(health.use),
        "entropy": list(health.entropy),
        "perplexity": list(health.perplexity),
        "num_distinct": health.num_distinct,
        "unique_ratio": health.unique_ratio,
        "num_colliding": health.num_colliding,
        "collision_rate": health.collision_rate,
        "largest_group": health.largest_group,
    }


def _features_json(features: FeatureMeasures, keys: Sequence[str]) -> dict[str, Any]:
    found, histogram = features.reconstruction, features.error_histogram
    return {
        "num_read": len(features.rows),
        "num_distinct": features.num_distinct,
        "reproduced": features.reproduced,
        "neighbours": None if features.agreement is None else asdict(features.agreement),
        "nearest_error": features.nearest_error,
        "reconstruction": None
        if found is None
        else {
            "error": found.error,
            "error_histogram": None if histogram is None else asdict(histogram),
            "worst": [{"item_key": keys[item], "error": error} for item, error in features.worst],
            "variance": found.variance,
            "explained": found.explained,
            "unquantized": found.unquantized,
            "explained_unquantized": found.explained_unquantized,
            "latent_variance": found.latent_variance,
            "latent_residual": list(found.latent_residual),
            "latent_explained": list(found.latent_explained),
        },
    }
