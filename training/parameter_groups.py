"""Settings for some of a model's parameters, chosen by name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from data.schemas import InputError
from training.checks import require_at_least
from training.gin_syntax import closest


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """How some parameters are trained otherwise than the rest.

    Attributes:
        parameters: patterns of their names, such as "*.bias" or "encoder.*" (fnmatch).
        learning_rate_factor: their rate is the loop's times this; 0 freezes them: they get no gradient and no moments.
        weight_decay: None takes the loop's.

    Raises:
        InputError: for no pattern, or a number out of range.
    """

    parameters: tuple[str, ...]
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parameters, str) or not self.parameters:
            raise InputError(
                f'ParameterGroup.parameters expected patterns such as ("*.bias",), got {self.parameters!r}.'
            )
        numbers = {"learning_rate_factor": self.learning_rate_factor, "weight_decay": self.weight_decay}
        require_at_least(0, "ParameterGroup", **numbers)
        for name, value in numbers.items():
            if value == math.inf:
                raise InputError(f"ParameterGroup.{name} expected a finite number, got inf.")


def grouped_parameters(
    model: nn.Module, groups: Sequence[ParameterGroup]
) -> list[tuple[ParameterGroup, dict[str, nn.Parameter]]]:
    """The trainable parameters of each group by name, and last a group of those that no other names, maybe none.

    Raises:
        InputError: if a pattern matches no trainable parameter, or if a group is left empty.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names, grouped = list(rest), []
    for number, group in enumerate(groups):
        where = f"LoopConfig.parameter_groups[{number}]"
        matching = [name for name in names if _matches(name, group.parameters)]
        for pattern in group.parameters:
            _require_match(pattern, names, where)
        members = {name: rest.pop(name) for name in matching if name in rest}
        if not members:
            raise InputError(
                f"{where}: groups before it name all that {group.parameters} matches, and a parameter belongs to the "
                "first group that names it. Put this group before them, or leave it out."
            )
        grouped.append((group, members))
    return [*grouped, (ParameterGroup(parameters=("*",)), rest)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_match(pattern: str, names: Sequence[str], where: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise InputError(
            f"{where}: {pattern!r} names none of the model's {len(names)} trainable parameters."
            f"{closest(pattern, names)} Patterns look like '*.bias'."
        )
