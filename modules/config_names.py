"""Configs that are read back from JSON."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from data.schemas import InputError


def check_names(config_class: type[Any], names: Iterable[str]) -> None:
    """InputError if a config class, a dataclass, lacks one of the names."""
    known = [field.name for field in fields(config_class)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InputError(
            f"{config_class.__name__} does not know {', '.join(unknown)}; valid names: {', '.join(known)}. "
            "The file may come from a newer version of this library."
        )
