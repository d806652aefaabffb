"""What becomes of items that share their codes."""

import enum

import torch
from torch import Tensor

from data.schemas import InputError
from modules.tokenizer import living
from modules.tokenizer.collisions import check_dedup_capacity, codebook_health, dedup_capacity, dedup_codes
from modules.tokenizer.nearest_free import CostsOf, joined, separated


class CollisionPolicy(enum.Enum):
    """What becomes of items that share their codes.

    DEDUP_CODE tells them apart by one more level, whose codes count them (Rajput et al. 2023, section 3.1).
    NEAREST_FREE moves all but one of them to free codes close by, without another level (MQL4GRec, arXiv 2504.05314).
    NONE lets them share their id, and lists them; rankers still tell them apart as items.
    """

    DEDUP_CODE = "dedup_code"
    NEAREST_FREE = "nearest_free"
    NONE = "none"

    @property
    def num_added_levels(self) -> int:
        """Levels behind those of the quantizer."""
        return int(self is CollisionPolicy.DEDUP_CODE)


def first_ids(
    policy: CollisionPolicy,
    codes: Tensor,
    codebook_sizes: tuple[int, ...],
    *,
    costs_of: CostsOf | None = None,
    dedup_size: int | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Ids of a whole catalogue.

    Args:
        policy: what to do.
        codes: [N, L] int64, the quantizer's.
        codebook_sizes: codes per level.
        costs_of: for NEAREST_FREE; None where there is no quantizer.
        dedup_size: for DEDUP_CODE, codes to reserve; None takes `dedup_capacity`.

    Returns:
        semantic ids [N, L or L + 1] int64, and the level sizes.

    Raises:
        InputError: if the dedup level, or the space of ids, cannot hold the items, `dedup_size` is given to a policy
            without such a level, or NEAREST_FREE has no costs.
    """
    if policy is CollisionPolicy.DEDUP_CODE:
        dedup = dedup_codes(codes)
        size = dedup_capacity(int(dedup.max()) + 1) if dedup_size is None else dedup_size
        check_dedup_capacity(dedup, size)
        return torch.cat([codes, dedup[:, None]], dim=1), (*codebook_sizes, size)
    if dedup_size is not None:
        raise InputError(
            f"dedup_size expected None, since {policy} has no dedup level, got {dedup_size}. Leave it out."
        )
    if policy is CollisionPolicy.NEAREST_FREE:
        if costs_of is None:
            raise InputError(
                f"{policy} expected a quantizer, whose distances say what is near, got ids alone. Use "
                f"{CollisionPolicy.DEDUP_CODE}, or {CollisionPolicy.NONE}, which keeps ids that are distinct already."
            )
        return separated(codes, codebook_sizes, costs_of), codebook_sizes
    return codes, codebook_sizes


def joining_ids(
    policy: CollisionPolicy,
    semantic_ids: Tensor,
    codes: Tensor,
    item_keys: list[str],
    level_sizes: tuple[int, ...],
    costs_of: CostsOf,
) -> Tensor:
    """Ids of items that join a catalogue, whose own stay.

    Args:
        policy: what to do.
        semantic_ids: [N, L or L + 1] int64 of the catalogue.
        codes: [M, L] int64, the quantizer's, of the items that join.
        item_keys: theirs.
        level_sizes: of the semantic ids.
        costs_of: for NEAREST_FREE, of the rows 0 to M - 1 of the items that join.

    Returns:
        [M, L or L + 1] int64.

    Raises:
        InputError: if a tuple of codes, or the whole space of ids, is full.
    """
    if policy is CollisionPolicy.DEDUP_CODE:
        dedup = living.free_dedup_codes(semantic_ids, codes, item_keys, level_sizes)
        return torch.cat([codes, dedup[:, None]], dim=1)
    if policy is CollisionPolicy.NEAREST_FREE:
        return joined(semantic_ids, codes, level_sizes, costs_of)
    return codes


def metrics_of_ids(policy: CollisionPolicy, semantic_ids: Tensor, nearest_codes: Tensor) -> dict[str, float]:
    """Numbers for the manifest that describe ids [N, L or L + 1] as the policy has left them.

    Args:
        policy: that made them.
        semantic_ids: of N items, dedup codes included.
        nearest_codes: [N, L], the quantizer's.
    """
    health = codebook_health(semantic_ids, (semantic_ids.amax(0) + 1).tolist())
    metrics = {
        "semantic_ids/unique_ratio": health.unique_ratio,
        "semantic_ids/colliding": float(health.num_colliding),
    }
    if policy is CollisionPolicy.NEAREST_FREE:
        metrics["semantic_ids/moved"] = float((semantic_ids != nearest_codes).any(dim=1).sum())
    return metrics
