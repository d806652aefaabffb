"""Lines that are Python dict literals, millions of them: `ast.literal_eval` alone would take a quarter of an hour."""

import ast
import re
from collections.abc import Sequence
from typing import Any

from data.sources.records import parse_record

_STRING = r"""u?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")"""
_VALUE = rf"{_STRING}|-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|True|False|None"
_PIECE = re.compile(rf"""((?:^\{{|(?<=,)\ )u?['"](\w+)['"]:\ ({_VALUE})(?:,|\}}$))""", re.VERBOSE)
"""A name and its value with the bracket or comma around them, as `repr` writes them."""


def literal_values(line: str, names: Sequence[str]) -> dict[str, Any] | None:
    """Some values of a dict literal, as `ast.literal_eval` gives them; nothing in the line is executed.

    A dict of strings, numbers, booleans and None, written as `repr` does, is cut into its pieces without being built;
    any other line, also a JSON object, is parsed.

    Args:
        line: without its line end.
        names: of the values; those that the dict lacks are left out.

    Returns:
        None where the line is no dict, or one of the values cannot be read.
    """
    pieces = _PIECE.findall(line)
    if not pieces or sum(len(piece) for piece, _, _ in pieces) != len(line):
        record = parse_record(line)
        return None if record is None else {name: record[name] for name in names if name in record}
    written = {name: value for _, name, value in pieces}
    try:
        return {name: _value(written[name]) for name in names if name in written}
    except (SyntaxError, ValueError):  # a broken escape, or a number that Python does not read
        return None


def _value(written: str) -> Any:
    plain = written.removeprefix("u")
    if plain[0] in "'\"" and "\\" not in plain:
        return plain[1:-1]
    return ast.literal_eval(written)
