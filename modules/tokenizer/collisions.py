"""Items that share a tuple of codes: the dedup code that tells them apart, and what a codebook's use looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.schemas import InputError

MIN_DEDUP_CAPACITY = 4


def dedup_codes(codes: Tensor) -> Tensor:
    """Position of every item among the items that share its codes, counted by item id.

    Items with larger ids never change the result for smaller ones. O(N log N).

    Args:
        codes: [N, L] int64, row i of item i.

    Returns:
        [N] int64; 0 for an item that is alone.
    """
    order, starts = sorted_groups(codes)
    position = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    result = np.empty(len(order), dtype=np.int64)
    result[order] = position
    return torch.from_numpy(result)


def joining_dedup_codes(semantic_ids: Tensor, codes: Tensor, codebook_sizes: Sequence[int]) -> Tensor:
    """Dedup codes of items that join a catalogue, each behind all others of its tuple; O(N log M) and no sort of N.

    Args:
        semantic_ids: [N, L] int64 of the catalogue, the dedup code last.
        codes: [M, L - 1] int64 of the items that join, in the order of their item ids.
        codebook_sizes: codes per level, of the L - 1 levels.

    Returns:
        [M] int64.
    """
    if len(codes) == 0:
        return codes.new_zeros(0)
    rows, tuples, joining_tuples = sharing_rows(semantic_ids[:, :-1], codes, codebook_sizes)
    num_taken = codes.new_zeros(len(codes))
    num_taken.scatter_reduce_(0, tuples, semantic_ids[rows, -1] + 1, "amax")
    return num_taken[joining_tuples] + dedup_codes(codes)


def dedup_capacity(largest_group: int) -> int:
    """Codes to reserve for the dedup level: the power of two that is at least twice what is needed, and at least 4.

    So at least as many items again can join the largest group later.
    """
    return max(MIN_DEDUP_CAPACITY, 1 << (2 * largest_group - 1).bit_length())


def check_dedup_capacity(dedup: Tensor, capacity: int) -> None:
    """Refuse dedup codes that the reserved level cannot hold.

    Raises:
        InputError: naming the first item that does not fit.
    """
    overflowing = (dedup >= capacity).nonzero()[:, 0]
    if len(overflowing):
        item_id = int(overflowing[0])
        raise InputError(
            f"the dedup level holds {capacity} items per tuple of codes, but item_id {item_id} would be number "
            f"{int(dedup[item_id]) + 1} of its tuple ({len(overflowing)} items overflow). Fit a new tokenizer on all "
            "items: it reserves at least twice what it needs. Many identical item features also cause this."
        )


def sorted_groups(codes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Item ids sorted by (codes, item id) [N], and the positions at which a new tuple begins [G]; codes are [N, L]."""
    columns = codes.cpu().numpy()
    order = np.lexsort(columns.T[::-1])  # stable: equal tuples keep the order of their item ids
    ordered = columns[order]
    is_start = np.ones(len(ordered), dtype=bool)
    is_start[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, is_start.nonzero()[0]


def sharing_items(codes: Tensor) -> Tensor:
    """Ascending item ids [R] int64 of those of [N, L] that share their codes with another item."""
    order, starts = sorted_groups(codes)
    sizes = np.diff(np.append(starts, len(order)))
    return torch.from_numpy(np.sort(order[np.repeat(sizes > 1, sizes)]))


def collision_groups(codes: Tensor) -> list[list[int]]:
    """Item ids of every tuple of codes [N, L] that several items share.

    Returns:
        groups, the largest first and equally large ones in the order of their codes; item ids ascend within each.
    """
    order, starts = sorted_groups(codes)
    ends = np.append(starts[1:], len(order))
    groups = [order[begin:end].tolist() for begin, end in zip(starts, ends, strict=True) if end - begin > 1]
    return sorted(groups, key=len, reverse=True)


@dataclass(frozen=True, kw_only=True)
class CodebookHealth:
    """How well semantic ids use their codebooks and tell items apart.

    Attributes:
        num_items: N.
        codebook_sizes: codes per level.
        num_used: codes with at least one item, per level.
        entropy: of the codes, in bits, per level; at most log2 of the codebook size.
        num_distinct: distinct tuples.
        num_colliding: items that share their tuple with another item.
        largest_group: most items on one tuple.
    """

    num_items: int
    codebook_sizes: tuple[int, ...]
    num_used: tuple[int, ...]
    entropy: tuple[float, ...]
    num_distinct: int
    num_colliding: int
    largest_group: int

    @property
    def use(self) -> tuple[float, ...]:
        """Share of the codes that have an item, per level."""
        return tuple(used / size for used, size in zip(self.num_used, self.codebook_sizes, strict=True))

    @property
    def perplexity(self) -> tuple[float, ...]:
        """2 to the entropy per level: the number of equally frequent codes that would be as varied."""
        return tuple(2.0**bits for bits in self.entropy)

    @property
    def unique_ratio(self) -> float:
        """Distinct tuples per item."""
        return self.num_distinct / self.num_items

    @property
    def collision_rate(self) -> float:
        """Share of the items that share their tuple."""
        return self.num_colliding / self.num_items

    def as_metrics(self, prefix: str = "codebook") -> dict[str, float]:
        """Flat numbers for a log: `{prefix}/use_level_0`, `{prefix}/collision_rate` and so on."""
        metrics: dict[str, float] = {}
        for level in range(len(self.codebook_sizes)):
            metrics[f"{prefix}/use_level_{level}"] = self.use[level]
            metrics[f"{prefix}/entropy_level_{level}"] = self.entropy[level]
            metrics[f"{prefix}/perplexity_level_{level}"] = self.perplexity[level]
        metrics[f"{prefix}/unique_ratio"] = self.unique_ratio
        metrics[f"{prefix}/collision_rate"] = self.collision_rate
        metrics[f"{prefix}/largest_group"] = float(self.largest_group)
        return metrics


def codebook_health(codes: Tensor, codebook_sizes: Sequence[int]) -> CodebookHealth:
    """Statistics of semantic ids without their dedup code.

    Args:
        codes: [N, L] integers, column l in [0, codebook_sizes[l]); N at least 1.
        codebook_sizes: codes per level.

    Raises:
        InputError: if the shape or a code does not fit the sizes.
    """
    sizes = tuple(codebook_sizes)
    check_codes(codes, sizes)
    counts = [torch.bincount(codes[:, level].cpu(), minlength=size) for level, size in enumerate(sizes)]
    starts = sorted_groups(codes)[1]
    groups = np.diff(np.append(starts, len(codes)))
    return CodebookHealth(
        num_items=len(codes),
        codebook_sizes=sizes,
        num_used=tuple(int((count > 0).sum()) for count in counts),
        entropy=tuple(_entropy_bits(count) for count in counts),
        num_distinct=len(groups),
        num_colliding=int(groups[groups > 1].sum()),
        largest_group=int(groups.max()),
    )


def check_codes(codes: Tensor, level_sizes: Sequence[int]) -> None:
    """Refuse codes [N, L] that are empty, of another number of levels, or outside a level's size (InputError)."""
    if codes.ndim != 2 or codes.shape[1] != len(level_sizes) or codes.numel() == 0:
        raise InputError(f"expected codes of shape [N >= 1, {len(level_sizes) or 'L >= 1'}], got {list(codes.shape)}.")
    lowest, highest = codes.amin(0).tolist(), codes.amax(0).tolist()
    for level, (size, low, high) in enumerate(zip(level_sizes, lowest, highest, strict=True)):
        if low < 0 or high >= size:
            raise InputError(f"level {level} expected codes in 0..{size - 1}, got {low}..{high}.")


def sharing_rows(codes: Tensor, wanted: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of codes [N, L] are among the rows wanted [M, L], M at least 1, level by level.

    Returns:
        [R] those rows, [R] the number of the distinct tuple that each holds, and the same of the wanted rows [M].
    """
    rows = torch.arange(len(codes))
    numbers, wanted_numbers = torch.zeros_like(rows), wanted.new_zeros(len(wanted))
    for level, size in enumerate(sizes):
        num_prefixes = int(wanted_numbers.max()) + 1
        prefixes, wanted_numbers = (wanted_numbers * size + wanted[:, level]).unique(return_inverse=True)
        places = _places(numbers * size + codes[rows, level], prefixes, num_prefixes * size)
        found = places >= 0
        rows, numbers = rows[found], places[found]
    return rows, numbers, wanted_numbers


def _places(values: Tensor, wanted: Tensor, bound: int) -> Tensor:
    """For every value below the bound its place among those wanted, ascending and distinct; -1 for others."""
    if bound <= len(values):  # the table is the smaller of the two, and several times faster than a search
        table = torch.full((bound,), -1)
        table[wanted] = torch.arange(len(wanted))
        return table[values]
    places = torch.searchsorted(wanted, values).clamp_(max=len(wanted) - 1)
    return places.where(wanted[places] == values, -1)


def _entropy_bits(counts: Tensor) -> float:
    share = counts[counts > 0].double() / counts.sum()
    return abs(float((share * share.log2()).sum()))
