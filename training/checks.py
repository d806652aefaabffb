"""Checks of plain settings."""

from data.schemas import InputError


def require_at_least(smallest: float, owner: str, **values: float | None) -> None:
    """Each value must be that large; None stands for "not set" and passes.

    Args:
        smallest: allowed.
        owner: what the values belong to, as a config writes it, such as "LoopConfig".
        values: by name.

    Raises:
        InputError: naming the first that is too small.
    """
    for name, value in values.items():
        if value is not None and not value >= smallest:
            raise InputError(f"{owner}.{name} expected at least {smallest:g}, got {value}.")
