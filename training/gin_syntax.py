"""Reading gin files and overrides into statements, each with its file and line; nothing is looked up or executed.

Uses gin's parser, and adds what it lacks: `include` relative to the including file, bare words on the command line,
and errors that name the file and the line.
"""

import difflib
import importlib
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin import config_parser

from data.schemas import InputError
from training.annotations import Later

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Reference(Later):
    """`@scope/name` (the configurable itself) or `@scope/name()` (what it returns).

    Attributes:
        selector: name as written, then the complete name once it has been looked up.
        kind: class of what the reference stands for; None until looked up, or when unknown.
    """

    scopes: tuple[str, ...]
    selector: str
    evaluate: bool
    kind: type | None = None


@dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str


@dataclass(frozen=True)
class Constant(Later):
    """`%Enum.MEMBER` or another constant registered in Python, by complete name."""

    name: str
    kind: type


@dataclass(frozen=True)
class Statement:
    """`scope/selector.parameter = value`; a macro definition has no parameter and its name in `selector`."""

    scope: str
    selector: str
    parameter: str
    value: Any
    origin: str

    @property
    def is_macro(self) -> bool:
        """Whether the statement defines a macro."""
        return not self.parameter

    @property
    def name(self) -> str:
        """What stands left of the equals sign."""
        return f"{self.scope}/" * bool(self.scope) + self.selector + f".{self.parameter}" * bool(self.parameter)


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as they are written; gin's own delegate would resolve them without our checks."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        *scopes, selector = scoped_configurable_name.split("/")
        return Reference(tuple(scopes), selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


class ConfigReader:
    """Collects statements from files and overrides, in the order in which they take effect."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self.text = ""

    def read_file(self, path: Path) -> None:
        """Add a file and what it includes."""
        self.text += self._read(path, origin=COMMAND_LINE, parents=())

    def read_text(self, text: str) -> None:
        """Add what another reader has collected as `text`."""
        self.text += self._add(Path("config.gin"), text, parents=())

    def read_override(self, override: str) -> None:
        """Add `NAME=VALUE` from the command line."""
        name, equals, written = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(?:[/.]\w+)*", name):
            raise InputError(f"{COMMAND_LINE}: expected --gin.NAME=VALUE, got --gin.{override}.")
        value, text = _parse_override(written)
        scope, selector, parameter = config_parser.parse_binding_key(name)
        self.statements.append(Statement(scope, selector, parameter, value, COMMAND_LINE))
        self.text += f"{name} = {text}  # {COMMAND_LINE}\n"

    def _read(self, path: Path, *, origin: str, parents: tuple[Path, ...]) -> str:
        if path.resolve() in parents:
            raise InputError(f"{origin}: {path} includes itself. Remove one of the includes.")
        return self._add(path, _read_text(path, origin), parents=(*parents, path.resolve()))

    def _add(self, path: Path, text: str, *, parents: tuple[Path, ...]) -> str:
        """Add the statements of a text; returns it with its includes inlined."""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        for statement in _parse(path, "".join(lines)):
            where = f"{path}:{statement.location.line_num}"
            if isinstance(statement, config_parser.IncludeStatement):
                included = Path(os.path.normpath(path.parent / statement.filename))
                inlined = self._read(included, origin=where, parents=parents)
                lines[statement.location.line_num - 1] = (
                    f"# --- {included}, included here\n{inlined}# --- back in {path}\n"
                )
            elif isinstance(statement, config_parser.ImportStatement):
                _import(statement, where)
            elif isinstance(statement, config_parser.BindingStatement):
                scope, selector, parameter, value, _ = statement
                self.statements.append(Statement(scope, selector, parameter, value, where))
        return "".join(lines)


def _read_text(path: Path, origin: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        siblings = [str(sibling) for sibling in path.parent.glob("*.gin")] if path.parent.is_dir() else []
        raise InputError(f"{origin}: config file {path} does not exist.{closest(str(path), siblings)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{origin}: config file {path} is not UTF-8 text ({error.reason}).") from error


def _parse(path: Path, text: str) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Delegate())
    except SyntaxError as error:
        message = (error.msg or "").split("\n")[-1].strip()
        raise InputError(
            f"{path}:{error.lineno}: not a valid config line ({message.rstrip('.')}). "
            "Expected NAME.PARAMETER = VALUE; text needs quotes in a file."
        ) from error
    except tokenize.TokenError as error:
        raise InputError(f"{path}:{error.args[1][0]}: the config ends inside a bracket or string; close it.") from error


def _import(statement: Any, where: str) -> None:
    module = statement.module.rsplit(".", 1)[0] if statement.is_from else statement.module
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{where}: cannot import {statement.module} ({error}). Remove the line.") from error


def _parse_override(written: str) -> tuple[Any, str]:
    """Value of an override and its text in a config file; what is no gin value is a string."""
    try:
        return _parse_value(written), written
    except (SyntaxError, tokenize.TokenError) as error:
        if written[:1] in tuple("([{%@'\""):
            raise InputError(
                f"{COMMAND_LINE}: {written} is not a valid value; check its brackets and quotes."
            ) from error
        return written, repr(written)


def _parse_value(written: str) -> Any:
    parser = config_parser.ConfigParser(written, _Delegate())
    value = parser.parse_value()
    if parser.current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
        raise SyntaxError("text after the value")
    return value


def is_value(written: str) -> bool:
    """Whether a text can stand right of the equals sign."""
    try:
        _parse_value(written)
    except (SyntaxError, tokenize.TokenError):
        return False
    return True


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value of the same nesting with every leaf (dict keys too) changed."""
    if isinstance(value, dict):
        return {map_leaves(key, change): map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, change) for item in value)
    return change(value)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a value that is no dict, list or tuple."""
    if isinstance(value, dict):
        for pair in value.items():
            yield from leaves(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def closest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """A sentence that names the candidate most like a name, with a space before it; empty when none is alike."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{matches[0]}?" if matches else ""
