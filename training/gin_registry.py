"""What configs may name: the configurables and constants that gin keeps in its registry, and how they are written.

The only file that reads gin's private registry; gin-config is pinned to 0.5.
"""

import enum
import inspect
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import gin
from gin import config as gin_internals

from training.gin_syntax import Constant, Reference

REQUIRED_CONSTANT = "gin.REQUIRED"


def register(*classes: type) -> None:
    """Make dataclasses configurable and enum members constants such as `%RecDataset.AMAZON`; twice does no harm."""
    with gin.unlock_config():
        for registered in classes:
            if not issubclass(registered, enum.Enum):
                gin.external_configurable(registered)
            elif f"{registered.__module__}.{next(iter(registered))}" not in gin_internals._CONSTANTS:
                gin.constants_from_enum(registered)


def registered() -> list[str]:
    """Complete names of all configurables."""
    return [selector for selector, _ in gin_internals._REGISTRY.items() if not selector.startswith("gin.")]


def matching(written: str) -> list[str]:
    """Complete names of the configurables that a name can mean; one only when the name is complete."""
    return sorted(gin_internals._REGISTRY.matching_selectors(written))


def is_class(selector: str) -> bool:
    """Whether a configurable is a class: it takes effect only where a reference leads to it."""
    return inspect.isclass(_wrapped(selector))


def parameters(selector: str) -> dict[str, inspect.Parameter]:
    """Parameters of a configurable that configs may set, in the order of its signature."""
    configurable = gin_internals._REGISTRY[selector]
    allowed, denied = configurable.allowlist, configurable.denylist or ()
    return {
        name: parameter
        for name, parameter in inspect.signature(configurable.wrapped).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and name not in denied
        and (not allowed or name in allowed)
    }


def has_default(parameter: inspect.Parameter) -> bool:
    """Whether a call works without a value for the parameter."""
    return parameter.default is not inspect.Parameter.empty and parameter.default is not gin.REQUIRED


def default(selector: str, parameter: inspect.Parameter) -> Any:
    """What a call without a value for the parameter takes; of a dataclass's field what its factory makes."""
    wrapped = _wrapped(selector)
    for field in fields(wrapped) if is_dataclass(wrapped) else ():
        if field.name == parameter.name and field.default_factory is not MISSING:
            return field.default_factory()
    return parameter.default


def annotation(selector: str, parameter: str) -> Any:
    """Type of a parameter; Any when it has none."""
    wrapped = _wrapped(selector)
    if inspect.isclass(wrapped) and not is_dataclass(wrapped):
        wrapped = wrapped.__init__
    return typing.get_type_hints(wrapped).get(parameter, Any)


def look_up(reference: Reference, selector: str) -> Reference:
    """A reference as read, completed with what its complete name stands for."""
    wrapped = _wrapped(selector)
    kind: Any = wrapped if inspect.isclass(wrapped) else typing.get_type_hints(wrapped).get("return")
    if not reference.evaluate:
        kind = type(wrapped)
    return Reference(reference.scopes, selector, reference.evaluate, kind if isinstance(kind, type) else None)


def matching_constants(written: str) -> list[Constant]:
    """Constants that a `%name` can mean."""
    names = sorted(gin_internals._CONSTANTS.matching_selectors(written))
    return [Constant(name, type(gin_internals._CONSTANTS[name])) for name in names]


def constant_names() -> list[str]:
    """Short names of all constants."""
    return [_short_constant(name) for name, _ in gin_internals._CONSTANTS.items()]


def short_name(selector: str) -> str:
    """Shortest name that means the configurable; functions keep their module, since every script has a `train`."""
    return gin_internals._REGISTRY.minimal_selector(selector) if is_class(selector) else selector


def written(value: Any) -> str:
    """A value as a config file writes it."""
    if isinstance(value, Reference):
        return "@" + "/".join([*value.scopes, short_name(value.selector)]) + "()" * value.evaluate
    if isinstance(value, Constant):
        return "%" + _short_constant(value.name)
    if isinstance(value, enum.Enum):
        return "%" + _short_constant(f"{type(value).__module__}.{value}")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(written, value)) + "," * (len(value) == 1) + ")"
    return repr(value)


def to_gin(leaf: Any) -> Any:
    """A leaf of a checked value as gin's injection expects it."""
    if isinstance(leaf, Reference):
        return gin_internals.ConfigurableReference("/".join([*leaf.scopes, leaf.selector]), leaf.evaluate)
    if isinstance(leaf, Constant):
        return gin_internals.ConfigurableReference(f"{leaf.name}/gin.constant", True)
    return leaf


def _wrapped(selector: str) -> Any:
    return gin_internals._REGISTRY[selector].wrapped


def _short_constant(name: str) -> str:
    short = ".".join(name.split(".")[-2:])
    return short if gin_internals._CONSTANTS.matching_selectors(short) in ([name], []) else name
