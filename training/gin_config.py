"""gin on a leash: every config name, value, scope and macro is checked before anything runs.

gin-config alone lets misspelt scopes and macros do nothing, checks no types, resolves `include` against the working
directory and reports a missing file as a TypeError. Here each such mistake is an InputError that names the file and
the line (or the command line) and the closest valid name. gin itself only keeps the registry and injects the values:
gin_syntax.py reads statements, gin_registry.py knows what they may name, this file holds the rules.

What a config may say, beyond plain gin:

* `train.x` means the function of the running script, also when several scripts' functions are registered.
* `include 'other.gin'` is relative to the file that says it.
* `--gin.NAME=word` takes a bare word as a string; numbers, tuples, None, True, %macros, @references and quoted
  strings mean what they mean in a file.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

from data.schemas import InputError
from training import gin_registry as registry
from training.annotations import MismatchError, conform, describe, mistake
from training.config_changes import DEFAULT, Setting, settings_text
from training.gin_registry import register, short_name, written
from training.gin_syntax import (
    COMMAND_LINE,
    ConfigReader,
    Constant,
    Macro,
    Reference,
    Statement,
    closest,
    leaves,
    map_leaves,
)

__all__ = ["LoadedConfig", "clear_config", "config_in_force", "load_config", "plain_message", "register"]

_in_force: "LoadedConfig | None" = None


def clear_config() -> None:
    """Forget every value that was loaded, and allow new configurables to be registered."""
    global _in_force
    _in_force = None
    gin.clear_config()


def config_in_force() -> "LoadedConfig | None":
    """The config that was loaded last, to hand its `apply` to processes that are started; None without one."""
    return _in_force


def plain_message(error: BaseException) -> str:
    """The message of an error that passed through a configurable, without what gin appends to it."""
    return str(error).split("\n  In call to configurable", 1)[0]


@dataclass(frozen=True)
class LoadedConfig:
    """A config that is valid and in force. It can be pickled, to be applied in another process.

    Attributes:
        text: what was given, includes inlined and overrides appended; a valid config by itself.
        settings: every parameter of everything the config reaches, defaults included.
        script: module name of the running script.
        supplied: parameters of its function that a config must not set.
    """

    text: str
    settings: tuple[Setting, ...]
    script: str
    supplied: tuple[str, ...]

    def operative_config(self) -> str:
        """Every parameter in use as a valid config, each line followed by where its value comes from."""
        return settings_text(self.settings)

    def apply(self, _worker: int = 0) -> None:
        """Put the values in force in this process: what gin knows does not reach processes that are spawned.

        Whatever starts them takes it as it is: `ProcessPoolExecutor(initializer=config.apply)`, or
        `DataLoader(worker_init_fn=config.apply)`, which passes the worker's number.
        """
        clear_config()
        if not registry.matching(f"{self.script}.train"):
            importlib.import_module(self.script)
        reader = ConfigReader()
        reader.read_text(self.text)
        _put_in_force(reader, self.script, self.supplied)


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str], *, script: str, supplied: Sequence[str] = ()
) -> LoadedConfig:
    """Read configs and overrides, check everything, and put the values in force; later values win.

    Args:
        paths: config files.
        overrides: `NAME=VALUE`, as after `--gin.` on the command line.
        script: module name under which the running script registered its `train` function.
        supplied: parameters of that function that its caller passes and a config must not set.

    Raises:
        InputError: for anything wrong in the config: where, expected, got, fix.
    """
    clear_config()
    reader = ConfigReader()
    for path in paths:
        reader.read_file(Path(path))
    for override in overrides:
        reader.read_override(override)
    return _put_in_force(reader, script, tuple(supplied))


def _put_in_force(reader: ConfigReader, script: str, supplied: tuple[str, ...]) -> LoadedConfig:
    global _in_force
    resolver = _Resolver(f"{script}.train", frozenset(supplied))
    config = _Config(resolver, [resolver.resolve(statement) for statement in reader.statements])
    config.check()
    config.bind()
    _in_force = LoadedConfig(reader.text, tuple(config.settings()), script, supplied)
    return _in_force


@dataclass(frozen=True)
class _Resolver:
    """Turns names as written into complete names.

    Attributes:
        entry: complete name of the running script's function.
        supplied: its parameters that configs must not set.
    """

    entry: str
    supplied: frozenset[str]

    def resolve(self, statement: Statement) -> Statement:
        """The statement with complete names; a macro definition keeps its name."""
        value = map_leaves(statement.value, lambda leaf: self._leaf(leaf, statement))
        if statement.is_macro:
            return Statement("", statement.name, "", value, statement.origin)
        selector = self._selector(statement.selector, statement)
        self._check_parameter(selector, statement)
        return Statement(statement.scope, selector, statement.parameter, value, statement.origin)

    def parameters(self, selector: str) -> dict[str, Any]:
        """Parameters that a config may set."""
        hidden = self.supplied if selector == self.entry else frozenset()
        return {name: value for name, value in registry.parameters(selector).items() if name not in hidden}

    def name(self, scopes: Iterable[str], selector: str, parameter: str) -> str:
        """How a user writes a parameter."""
        target = "train" if selector == self.entry else short_name(selector)
        return "/".join([*scopes, f"{target}.{parameter}"])

    def _leaf(self, leaf: Any, statement: Statement) -> Any:
        if isinstance(leaf, Reference):
            return registry.look_up(leaf, self._selector(leaf.selector, statement))
        if isinstance(leaf, Macro):
            constants = registry.matching_constants(leaf.name)
            if len(constants) > 1:
                names = ", ".join(f"%{constant.name}" for constant in constants)
                raise InputError(f"{statement.origin}: %{leaf.name} is ambiguous; write one of: {names}.")
            return constants[0] if constants else leaf
        return leaf

    def _selector(self, name: str, statement: Statement) -> str:
        if registry.matching(self.entry) == [self.entry] and name == self.entry.rsplit(".", 1)[1]:
            return self.entry
        matches = registry.matching(name)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InputError(f"{statement.origin}: {name} is ambiguous; write one of: {', '.join(matches)}.")
        names = sorted(short_name(selector) for selector in registry.registered())
        place = f" (in {statement.name})" if name != statement.selector else ""
        raise InputError(
            f"{statement.origin}: nothing configurable is called {name}{place}.{closest(name, [*names, 'train'])} "
            f"Valid: {', '.join(names)}."
        )

    def _check_parameter(self, selector: str, statement: Statement) -> None:
        if selector == self.entry and statement.parameter in self.supplied:
            raise InputError(f"{statement.origin}: {statement.name} is set by the program, not by configs. Remove it.")
        valid = self.parameters(selector)
        if statement.parameter not in valid:
            raise InputError(
                f"{statement.origin}: {short_name(selector)} has no parameter {statement.parameter}."
                f"{closest(statement.parameter, valid)} Valid: {', '.join(valid)}."
            )


@dataclass(frozen=True)
class _Call:
    """A configurable that runs with the given scopes active.

    Attributes:
        by_gin: gin makes the call, so that every parameter without a default needs a value; False for `@name`
            without parentheses, which the program calls with arguments of its own.
    """

    scopes: tuple[str, ...]
    selector: str
    by_gin: bool = True

    def binding_scopes(self) -> list[str]:
        """Scopes whose values apply, weakest first."""
        return ["/".join(self.scopes[:depth]) for depth in range(len(self.scopes) + 1)]

    def references(self, values: Iterable[Any]) -> Iterator["_Call"]:
        """Calls that references in a parameter's value lead to; without scopes of its own one keeps these."""
        for leaf in values:
            if isinstance(leaf, Reference):
                yield _Call(leaf.scopes or self.scopes, leaf.selector, leaf.evaluate)


class _Config:
    """All statements of a run and the rules for them as a whole.

    Args:
        resolver: names of the run.
        statements: resolved, in the order in which they take effect.
    """

    def __init__(self, resolver: _Resolver, statements: list[Statement]) -> None:
        self._resolver = resolver
        self._all = statements
        self._macros = {statement.selector: statement for statement in statements if statement.is_macro}
        self._values = {
            (statement.scope, statement.selector, statement.parameter): statement
            for statement in statements
            if not statement.is_macro
        }

    def check(self) -> None:
        """Raise for undefined and unused macros, missing values, wrong types and statements without effect."""
        for statement in self._all:
            self._check_macros_defined(statement)
        for statement in self._macros.values():
            self._expand(statement)
        for statement in self._values.values():
            self._typed_value(statement)
        self._check_values_used()
        self._check_macros_used()
        self._check_overrides_win()
        for call in self._reach([_Call((), self._resolver.entry)]):
            self._check_complete(call)

    def bind(self) -> None:
        """Hand the checked values to gin and lock it."""
        for key, statement in self._values.items():
            gin.bind_parameter(key, map_leaves(self._typed_value(statement), registry.to_gin))
        gin.finalize()

    def settings(self) -> Iterator[Setting]:
        """Every parameter of every call that the values in force lead to."""
        for call, functions in self._users().items():
            for name, parameter in self._resolver.parameters(call.selector).items():
                winner = self._winner(call, name)
                if winner is None and not registry.has_default(parameter):
                    continue
                value = self._expand(winner) if winner else registry.default(call.selector, parameter)
                complete = "/".join([*call.scopes, f"{short_name(call.selector)}.{name}"])
                origin = self._origin(winner) if winner else DEFAULT
                yield Setting(complete, written(value), origin, tuple(functions))

    def _users(self) -> dict[_Call, list[str]]:
        """Every call that the values in force lead to, with the functions from which it is reached."""
        users: dict[_Call, list[str]] = {}
        for function in self._functions():
            for call in self._reach([function]):
                users.setdefault(call, []).append(function.selector)
        return users

    def _functions(self) -> list[_Call]:
        """The running script's function, and other functions that the config has values for."""
        set_ = [_Call((), key[1]) for key in self._values if not key[0] and not registry.is_class(key[1])]
        return list(dict.fromkeys([_Call((), self._resolver.entry), *set_]))

    def _origin(self, statement: Statement) -> str:
        """Where a value was written, and where the macros in it were."""
        names = [leaf.name for leaf in leaves(statement.value) if isinstance(leaf, Macro)]
        macros = [f", %{name} from {self._origin(self._macros[name])}" for name in dict.fromkeys(names)]
        return statement.origin + "".join(macros)

    def _name(self, statement: Statement) -> str:
        if statement.is_macro:
            return statement.selector
        return self._resolver.name(
            [statement.scope] if statement.scope else [], statement.selector, statement.parameter
        )

    def _check_macros_defined(self, statement: Statement) -> None:
        for leaf in leaves(statement.value):
            if isinstance(leaf, Macro) and leaf.name not in self._macros:
                names = [*self._macros, *registry.constant_names()]
                fix = _siblings(leaf.name) or f"Define it: {leaf.name} = VALUE."
                raise InputError(
                    f"{statement.origin}: {self._name(statement)} uses %{leaf.name}, which is not defined."
                    f"{closest(leaf.name, names, prefix='%')} {fix}"
                )

    def _expand(self, statement: Statement, parents: tuple[str, ...] = ()) -> Any:
        """Value of a statement with macros replaced by what they stand for."""

        def expand(leaf: Any) -> Any:
            if isinstance(leaf, Constant) and leaf.name == registry.REQUIRED_CONSTANT:
                name = self._name(statement)
                raise InputError(f"{statement.origin}: {name} is required. Set it: --gin.{name}=VALUE.")
            if not isinstance(leaf, Macro):
                return leaf
            if leaf.name in parents:
                raise InputError(f"{statement.origin}: macro %{leaf.name} is defined by itself.")
            return self._expand(self._macros[leaf.name], (*parents, leaf.name))

        return map_leaves(statement.value, expand)

    def _typed_value(self, statement: Statement) -> Any:
        value = self._expand(statement)
        annotation = registry.annotation(statement.selector, statement.parameter)
        try:
            return conform(value, annotation)
        except MismatchError as error:
            kind = "" if value is None or isinstance(value, Reference | Constant) else f" ({type(value).__name__})"
            forgotten = isinstance(value, Reference) and not value.evaluate and registry.is_class(value.selector)
            fix = f" Write {written(value)}()." if forgotten else mistake(annotation)
            raise InputError(
                f"{statement.origin}: {self._name(statement)} expected {describe(annotation)}, "
                f"got {written(value)}{kind}.{fix}"
            ) from error

    def _check_values_used(self) -> None:
        """A statement that no reference leads to is a typo; references that were overridden later still count."""
        used = self._used_bindings()
        scopes = sorted({scope for scope, _ in used if scope})
        for (scope, selector, _), statement in self._values.items():
            if (scope, selector) in used:
                continue
            target = "/".join([*([scope] if scope else []), short_name(selector)])
            hint = f" Write train.NAME = @{target}()."
            if scope:
                hint = f"{closest(scope, scopes)} Scopes in use: {', '.join(scopes) or 'none'}."
            raise InputError(
                f"{statement.origin}: {self._name(statement)} has no effect: nothing refers to @{target}().{hint}"
            )

    def _check_macros_used(self) -> None:
        used = {leaf.name for statement in self._all for leaf in leaves(statement.value) if isinstance(leaf, Macro)}
        entry = self._resolver.entry
        settable = self._resolver.parameters(entry) if registry.matching(entry) else {}
        names = [*used, *(f"train.{name}" for name in settable)]
        for name, statement in self._macros.items():
            if name not in used:
                raise InputError(
                    f"{statement.origin}: nothing uses the macro {name}.{closest(name, names)} "
                    f"Use it as %{name}, or name a parameter (train.{name})."
                )

    def _check_overrides_win(self) -> None:
        """A value from the command line must not lose everywhere to values of the config that name a scope."""
        calls = self._reach(self._functions())
        for (_, selector, parameter), statement in self._values.items():
            if statement.origin != COMMAND_LINE:
                continue
            found = [self._winner(call, parameter) for call in calls if call.selector == selector]
            winners = {self._name(winner): winner for winner in found if winner}
            if winners and statement not in winners.values():
                raise InputError(
                    f"{statement.origin}: {self._name(statement)} has no effect: "
                    f"{next(iter(winners.values())).origin} sets {next(iter(winners))}. "
                    f"Write {' or '.join(f'--gin.{name}=VALUE' for name in winners)}."
                )

    def _check_complete(self, call: _Call) -> None:
        for name, parameter in self._resolver.parameters(call.selector).items():
            if call.by_gin and not registry.has_default(parameter) and self._winner(call, name) is None:
                target = self._resolver.name(call.scopes, call.selector, name)
                expected = describe(registry.annotation(call.selector, name))
                raise InputError(
                    f"config: {target} ({expected}) has no value. Set it in the config or with --gin.{target}=VALUE."
                )

    def _reach(self, roots: Iterable[_Call]) -> list[_Call]:
        """Roots and every call that the values in force lead to, in order of discovery."""
        reached: dict[_Call, None] = {}
        pending = [root for root in roots if registry.matching(root.selector)]
        while pending:
            call = pending.pop(0)
            if call in reached:
                continue
            reached[call] = None
            winners = [self._winner(call, name) for name in registry.parameters(call.selector)]
            values = [leaf for winner in winners if winner for leaf in leaves(self._expand(winner))]
            pending.extend(call.references(values))
        return list(reached)

    def _winner(self, call: _Call, parameter: str) -> Statement | None:
        for scope in reversed(call.binding_scopes()):
            if (scope, call.selector, parameter) in self._values:
                return self._values[scope, call.selector, parameter]
        return None

    def _used_bindings(self) -> set[tuple[str, str]]:
        """(scope, selector) of every statement that any reference, overridden or not, leads to from a function."""
        pending = [_Call((), selector) for selector in registry.registered() if not registry.is_class(selector)]
        seen: set[_Call] = set()
        used: set[tuple[str, str]] = set()
        while pending:
            call = pending.pop()
            if call in seen:
                continue
            seen.add(call)
            keys = {(scope, call.selector) for scope in call.binding_scopes()}
            used |= keys
            for statement in self._all:
                if (statement.scope, statement.selector) in keys:
                    pending.extend(call.references(self._every_leaf(statement.value)))
        return used

    def _every_leaf(self, value: Any, parents: tuple[str, ...] = ()) -> Iterator[Any]:
        """Leaves of a value, each macro replaced by all the values it is ever given."""
        for leaf in leaves(value):
            yield leaf
            if isinstance(leaf, Macro) and leaf.name not in parents:
                for statement in self._all:
                    if statement.is_macro and statement.selector == leaf.name:
                        yield from self._every_leaf(statement.value, (*parents, leaf.name))


def _siblings(name: str) -> str:
    """The members of the enumeration that a name such as RecDataset.AMAZONE seems to mean."""
    enumeration, dot, _ = name.rpartition(".")
    members = [known for known in registry.constant_names() if dot and known.rpartition(".")[0].endswith(enumeration)]
    return f"Valid: {', '.join(f'%{member}' for member in members)}." if members else ""
