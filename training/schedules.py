"""Learning-rate schedules: the factor by which the base rate is multiplied at each optimizer step."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "inverse_sqrt"]


def schedule_factor(name: ScheduleName, *, warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Factor as a function of the step, counted from 0.

    During warm-up it rises linearly and reaches 1 at the last warm-up step. After that: `constant` stays at 1;
    `linear` and `cosine` (half a period) fall to 0 at num_steps; `inverse_sqrt` is sqrt(warmup_steps / (step + 1)),
    as in T5 (Raffel et al. 2020).
    """

    def decayed(step: int) -> float:
        if name == "constant":
            return 1.0
        if name == "inverse_sqrt":
            return math.sqrt(max(warmup_steps, 1) / (step + 1))
        progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
        return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else decayed(step)
