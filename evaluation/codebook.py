"""Codebook health: what is logged at every evaluation of an RQ-VAE, and when a run has to stop."""

from data.schemas import InputError
from modules.tokenizer.collisions import CodebookHealth, codebook_health

__all__ = ["CodebookHealth", "check_collapse", "codebook_health"]


def check_collapse(health: CodebookHealth, min_use: float) -> None:
    """Stop a run whose codebook has collapsed.

    A level cannot use more codes than there are items, so with few items their number is the measure; behind a level
    that gives each of them a code of its own, the others have nothing to do.

    Args:
        health: of the ids of all items.
        min_use: smallest share of a level's codes, in (0, 1], that must have an item.

    Raises:
        InputError: naming the first level below the threshold and what to change.
    """
    if not 0 < min_use <= 1:
        raise InputError(f"min_use expected a share in (0, 1], got {min_use}.")
    for level, (used, size) in enumerate(zip(health.num_used, health.codebook_sizes, strict=True)):
        usable = min(size, health.num_items)
        if used < min_use * usable:
            raise InputError(
                f"codebook collapse: level {level} uses {used} of {usable} codes ({used / usable:.1%}), expected at "
                f"least {min_use:.1%}; {health.collision_rate:.1%} of {health.num_items} items share their codes. "
                "Train the autoencoder longer before k-means sets the codebooks, lower the learning rate, raise the "
                "batch size, set RqVaeConfig.restart_after, try another quantize mode (ROTATION_TRICK, or sim_vq), or "
                "use smaller codebooks; nearly identical item features also cause this."
            )
        if used == health.num_distinct:  # this level tells apart what can be told apart, and leaves nothing over
            return
