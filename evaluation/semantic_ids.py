"""Whether semantic ids mean something: do items on one prefix belong together, and are near items near in ids?

A codebook can be used evenly by ids that say nothing about the items. Prefix purity compares prefixes with the
catalogue's categories, neighbour agreement compares them with the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import InputError

CATEGORY_SEPARATOR = " > "
"""Between the parts of a category path, from general to specific."""

_BLOCK_ROWS = 8192
_NO_MORE = -2.0
"""Below every cosine."""


@dataclass(frozen=True, kw_only=True)
class Purity:
    """How often items on one prefix are of one category.

    Attributes:
        depth: codes of the prefix.
        share: for an item that shares its prefix, the share of the others there that have its category, in [0, 1];
            mean over such items, None where there are none.
        num_items: items over which the mean is taken.
        num_prefixes: prefixes that they share.
        chance: `share` of ids that know nothing: the probability that two different items are of one category;
            None for fewer than two items with a category.
    """

    depth: int
    share: float | None
    num_items: int
    num_prefixes: int
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class NeighbourAgreement:
    """How many of an item's nearest items in feature space are near it in ids.

    Attributes:
        num_neighbours: k, the neighbours of every item.
        num_sampled: items whose neighbours were looked up.
        overlap: share of the k nearest by features that are among the k of the longest shared prefix; where prefixes
            tie, the expectation over their orders.
        overlap_chance: of ids that know nothing.
        by_depth: at place d the share of the k nearest by features that share the first d + 1 codes.
        chance_by_depth: the same of any two different items, over the sampled ones.
    """

    num_neighbours: int
    num_sampled: int
    overlap: float
    overlap_chance: float
    by_depth: tuple[float, ...]
    chance_by_depth: tuple[float, ...]


def prefix_purity(codes: Tensor, categories: Sequence[str], depth: int) -> Purity:
    """Purity of the prefixes of one length; items without category are left out. O(N log N).

    A prefix with one item has nothing to be compared with and does not count, so that longer prefixes are not pure
    only because they are alone.

    Args:
        codes: [N, L] integers at least 0, without dedup code.
        categories: of the N items, "" where unknown; compared as they are, see `category_prefixes`.
        depth: codes of a prefix, 1 to L.

    Raises:
        InputError: if the lengths differ, or the depth is not one of the codes.
    """
    _check_codes(codes, len(categories), "categories")
    if not 1 <= depth <= codes.shape[1]:
        raise InputError(f"prefix_purity expected a depth of 1 to {codes.shape[1]} codes, got {depth}.")
    known = torch.tensor([bool(category) for category in categories], dtype=torch.bool)
    numbers = {category: number for number, category in enumerate(dict.fromkeys(categories))}
    category = np.array([numbers[name] for name in categories if name], dtype=np.int64)
    prefix = prefix_numbers(codes[known], depth)
    sizes = np.bincount(prefix)
    pairs, counts = np.unique(prefix * len(numbers) + category, return_counts=True)
    is_shared = sizes > 1
    num_items = int(sizes[is_shared].sum())
    others = np.maximum(sizes[pairs // len(numbers)] - 1, 1) if len(pairs) else counts
    return Purity(
        depth=depth,
        share=float((counts * (counts - 1) / others).sum() / num_items) if num_items else None,
        num_items=num_items,
        num_prefixes=int(is_shared.sum()),
        chance=_same_category_by_chance(category),
    )


def purity_by_depth(codes: Tensor, categories: Sequence[str]) -> list[Purity]:
    """`prefix_purity` of every depth from 1 to L."""
    return [prefix_purity(codes, categories, depth) for depth in range(1, codes.shape[1] + 1)]


def category_prefixes(categories: Sequence[str], depth: int) -> list[str]:
    """The first parts of category paths: "Beauty > Makeup" of "Beauty > Makeup > Nails" for a depth of 2."""
    return [CATEGORY_SEPARATOR.join(path.split(CATEGORY_SEPARATOR)[:depth]) for path in categories]


def prefix_numbers(codes: Tensor, depth: int) -> np.ndarray:
    """A number for every item, equal for items with the same first codes.

    Args:
        codes: [N, L] integers at least 0.
        depth: codes of a prefix, 0 to L.

    Returns:
        [N] int64, 0 to the number of distinct prefixes - 1, ascending in the prefixes' lexicographic order.
    """
    columns = codes[:, :depth].cpu().numpy().astype(np.int64)
    numbers = np.zeros(len(columns), dtype=np.int64)
    for column in columns.T:  # renumbered at every level, so that products stay small
        numbers = np.unique(numbers * (column.max(initial=0) + 1) + column, return_inverse=True)[1].reshape(-1)
    return numbers


def shared_prefix_lengths(codes: Tensor, queries: Tensor) -> Tensor:
    """How many first codes items share: [Q, N] int64 of codes [N, L] and queries [Q, L]."""
    return (queries[:, None] == codes[None]).long().cumprod(dim=2).sum(dim=2)


def nearest_by_features(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k other rows of largest cosine; a row of zeros has cosine 0 with all others.

    Args:
        features: [N, D], any float dtype; compared in fp32.
        rows: [Q] int64, the rows whose neighbours are wanted.
        k: at most N - 1.

    Returns:
        rows [Q, k] int64, nearest first, and their cosines [Q, k] fp32.

    Raises:
        InputError: if there are fewer than k other rows.
    """
    if not 1 <= k < len(features):
        raise InputError(f"nearest_by_features expected k of 1 to {len(features) - 1} (N - 1), got {k}.")
    queries = F.normalize(features[rows].float(), dim=1)
    values, found = queries.new_full((len(rows), k), _NO_MORE), rows.new_full((len(rows), k), -1)
    for begin in range(0, len(features), _BLOCK_ROWS):
        block = F.normalize(features[begin : begin + _BLOCK_ROWS].float(), dim=1)
        cosines = queries @ block.T
        itself = (rows >= begin) & (rows < begin + len(block))
        cosines[itself.nonzero()[:, 0], rows[itself] - begin] = _NO_MORE
        best, places = cosines.topk(min(k, len(block)), dim=1)
        values, order = torch.cat([values, best], dim=1).topk(k, dim=1)
        found = torch.cat([found, places + begin], dim=1).gather(1, order)
    return found, values


def neighbour_agreement(
    features: Tensor, codes: Tensor, *, num_neighbours: int = 10, num_sampled: int = 1000, seed: int = 0
) -> NeighbourAgreement:
    """Compare neighbours by features with neighbours by ids, for a sample of the items.

    Args:
        features: [N, D].
        codes: [N, L] of the same items, without dedup code.
        num_neighbours: k; all others where there are fewer.
        num_sampled: items whose neighbours are looked up; all where there are fewer.
        seed: of the sample.

    Raises:
        InputError: if the lengths differ, or there are fewer than two items.
    """
    _check_codes(codes, len(features), "features")
    if len(features) < 2:
        raise InputError(f"neighbour_agreement expected at least 2 items, got {len(features)}.")
    k = min(num_neighbours, len(features) - 1)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(features), generator=generator)[:num_sampled].sort().values
    near = nearest_by_features(features, rows, k)[0].to(codes.device)
    shared = [_shared_with(codes, rows, near, depth) for depth in range(1, codes.shape[1] + 1)]
    num_sharing = torch.stack([_num_sharing(codes, rows, depth) for depth in range(1, codes.shape[1] + 1)], dim=1)
    return NeighbourAgreement(
        num_neighbours=k,
        num_sampled=len(rows),
        overlap=float(_chance_of_listing(torch.stack(shared).sum(dim=0), num_sharing, len(features), k).mean()),
        overlap_chance=k / (len(features) - 1),
        by_depth=tuple(float(same.double().mean()) for same in shared),
        chance_by_depth=tuple((num_sharing.double().mean(dim=0) / (len(features) - 1)).tolist()),
    )


def _shared_with(codes: Tensor, rows: Tensor, near: Tensor, depth: int) -> Tensor:
    """[Q, k] bool: which neighbours have the first codes of their row."""
    return (codes[near, :depth] == codes[rows, None, :depth]).all(dim=2)


def _num_sharing(codes: Tensor, rows: Tensor, depth: int) -> Tensor:
    """[Q] int64: how many others share the first codes of a row."""
    prefix = prefix_numbers(codes, depth)
    return torch.from_numpy(np.bincount(prefix)[prefix[rows.numpy()]] - 1)


def _chance_of_listing(lengths: Tensor, num_sharing: Tensor, num_items: int, k: int) -> Tensor:
    """Probability that the k items of the longest shared prefixes, ties in any order, hold each neighbour.

    Args:
        lengths: [Q, k] codes that a neighbour shares with its row.
        num_sharing: [Q, L] others that share at least the first 1..L codes of a row.
        num_items: N.
        k: length of the list.

    Returns:
        [Q, k] fp64.
    """
    num_sharing = F.pad(num_sharing, (1, 0), value=num_items - 1)
    at_least = num_sharing.gather(1, lengths)
    longer = F.pad(num_sharing, (0, 1)).gather(1, lengths + 1)
    return ((k - longer).clamp(min=0).double() / (at_least - longer)).clamp(max=1.0)


def _same_category_by_chance(category: np.ndarray) -> float | None:
    if len(category) < 2:
        return None
    counts = np.bincount(category).astype(np.float64)
    return float((counts * (counts - 1)).sum() / (len(category) * (len(category) - 1)))


def _check_codes(codes: Tensor, expected: int, name: str) -> None:
    if codes.ndim != 2 or len(codes) != expected:
        raise InputError(f"expected codes of shape [N, L] for {expected} {name}, got {list(codes.shape)}.")
