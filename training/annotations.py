"""Does a value fit a type annotation? Used for config values, whose types gin does not check."""

import collections.abc
import enum
import inspect
import re
import types
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any


class Later:
    """Stands for a value that exists only when the program runs, such as a config reference.

    Attributes:
        kind: class of the value, None when unknown (fits every annotation).
    """

    kind: type | None


class MismatchError(Exception):
    """The value does not fit the annotation."""


def describe(annotation: Any) -> str:
    """An annotation as a person would write it: `tuple[int, ...]`, `QuantizeMode`, `float | None`."""
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", inspect.formatannotation(annotation)).replace("NoneType", "None")


def mistake(annotation: Any) -> str:
    """A sentence that says how to write a value for an annotation where that is easily got wrong; else empty."""
    for member in [annotation, *typing.get_args(annotation)]:
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return f" Write one of: {', '.join(f'%{member.__name__}.{choice.name}' for choice in member)}."
        if is_dataclass(member):
            return f" Write @{describe(member)}() and set its fields as {describe(member)}.FIELD = VALUE."
    return ""


def conform(value: Any, annotation: Any) -> Any:
    """The value as the annotation wants it: an int given for a float becomes a float, a list for a tuple a tuple.

    Bare generics and `Any` accept everything. A bool is not an int here.

    Raises:
        MismatchError: if the value does not fit.
    """
    if annotation in (Any, inspect.Parameter.empty, object) or isinstance(annotation, typing.TypeVar):
        return value
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _conform_union(value, annotation)
    if origin is typing.Literal:
        return _require(value, any(value == choice and type(value) is type(choice) for choice in annotation.__args__))
    if isinstance(value, Later):
        return _require(value, _will_fit(value.kind, origin or annotation))
    if origin is not None:
        return _conform_generic(value, origin, typing.get_args(annotation))
    return _conform_plain(value, annotation)


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise MismatchError
    return value


def _will_fit(kind: type | None, wanted: Any) -> bool:
    if kind is None:
        return True
    if wanted is float and kind is int:
        return True
    if wanted is int and kind is bool:
        return False
    return isinstance(wanted, type) and issubclass(kind, wanted)


def _conform_union(value: Any, annotation: Any) -> Any:
    members = typing.get_args(annotation)
    exact = [member for member in members if isinstance(member, type) and type(value) is member]
    for member in exact + list(members):
        try:
            return conform(value, member)
        except MismatchError:
            continue
    raise MismatchError


def _conform_generic(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    if origin is dict or origin is collections.abc.Mapping:
        _require(value, isinstance(value, dict))
        key, item = arguments
        return {conform(k, key): conform(v, item) for k, v in value.items()}
    if origin is tuple:
        return _conform_tuple(value, arguments)
    if origin in (list, collections.abc.Sequence):
        _require(value, isinstance(value, list | tuple))
        items = [conform(item, arguments[0]) for item in value]
        return items if origin is list else tuple(items)
    return _require(value, isinstance(origin, type) and isinstance(value, origin))


def _conform_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, list | tuple))
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(conform(item, arguments[0]) for item in value)
    _require(value, len(value) == len(arguments))
    return tuple(conform(item, argument) for item, argument in zip(value, arguments, strict=True))


def _conform_plain(value: Any, annotation: Any) -> Any:
    if annotation is None or annotation is type(None):
        return _require(value, value is None)
    if annotation is float:
        return float(_require(value, isinstance(value, int | float) and not isinstance(value, bool)))
    if annotation is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool))
    if annotation is tuple:
        return tuple(_require(value, isinstance(value, list | tuple)))
    if annotation is Path:
        return Path(_require(value, isinstance(value, str | Path)))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _require(value, isinstance(value, annotation))
    return _require(value, isinstance(annotation, type) and isinstance(value, annotation))
