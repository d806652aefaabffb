"""Settings for some of a model's parameters, chosen by name."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """How some parameters are trained otherwise than the rest.

    Attributes:
        parameters: patterns of their names, such as "*.bias" or "encoder.*" (fnmatch).
        learning_rate_factor: their rate is the loop's times this; 0 leaves them as they are.
        weight_decay: None takes the loop's.
    """

    parameters: tuple[str, ...]
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
