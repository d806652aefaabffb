"""Histories as JSON lines, read in blocks: the unit of batch, restart and process in a run of `recommend.py`."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from data.schemas import InputError

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """One user's history, with whatever the input named the user."""

    user: Any
    history: list[str]

    def user_key(self) -> str | None:
        """The user as the prepared dataset names users: as text; None where there is none."""
        return str(self.user) if isinstance(self.user, str | int) else None


class Problem(NamedTuple):
    """A line of the input that cannot be used; the first one has number 1."""

    line: int
    message: str


@dataclass(frozen=True)
class Block:
    """Consecutive lines of a file.

    Attributes:
        index: number of the block, from 0.
        first_line: number of its first line, from 1.
        lines: as they are in the file; of longer ones the first MAX_LINE_BYTES.
        end: where the file goes on behind the block.
    """

    index: int
    first_line: int
    lines: list[bytes]
    end: int


def check_input(path: Path | None, *, read_again: bool) -> None:
    """InputError when a file of JSON lines cannot be read, or cannot be read again where that is needed."""
    if path is None:
        return
    problem = None
    if not path.exists():
        problem = "there is no such file"
    elif path.is_dir():
        problem = "it is a folder"
    elif not os.access(path, os.R_OK):
        problem = "permission denied"
    if problem:
        raise InputError(f"cannot read {path}: {problem}. Give a file of JSON lines.")
    if read_again and not path.is_file():
        raise InputError(
            f"cannot read {path} again after a restart: it is no regular file. Give one, or send what is printed "
            "without --output to a file."
        )


def read_blocks(stream: BinaryIO, num_lines: int, *, first: int = 0) -> Iterator[Block]:
    """Blocks of `num_lines` lines, the last one of what is left.

    Args:
        stream: stands where block `first` begins.
        num_lines: per block.
        first: index of the first block that is read.
    """
    index, end = first, stream.tell() if stream.seekable() else 0
    lines: list[bytes] = []
    while line := stream.readline(MAX_LINE_BYTES):
        end += len(line) + _skipped_rest(stream, line)
        lines.append(line)
        if len(lines) == num_lines:
            yield Block(index, index * num_lines + 1, lines, end)
            index, lines = index + 1, []
    if lines:
        yield Block(index, index * num_lines + 1, lines, end)


def with_progress(blocks: Iterator[Block], stream: BinaryIO, *, shown: bool = True) -> Iterator[Block]:
    """The blocks, with a bar on stderr that shows how far into the file they are, when someone watches."""
    begin = stream.tell() if stream.seekable() else 0
    size = os.fstat(stream.fileno()).st_size or None
    with tqdm(total=size, initial=begin, unit="B", unit_scale=True, disable=None if shown else True) as bar:
        for block in blocks:
            yield block
            bar.set_postfix_str(f"{block.first_line - 1 + len(block.lines):,} lines", refresh=False)
            bar.update(block.end - bar.n)


def _skipped_rest(stream: BinaryIO, line: bytes) -> int:
    """Bytes that a line is longer than what was read of it."""
    skipped = 0
    while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE_BYTES)
        skipped += len(line)
    return skipped


def parse_block(block: Block) -> tuple[list[tuple[int, Request]], list[Problem]]:
    """The requests of a block with their line numbers, and the lines that are none; blank lines are passed over."""
    requests, problems = [], []
    for number, line in enumerate(block.lines, start=block.first_line):
        if not line.strip():
            continue
        try:
            requests.append((number, parse_request(line)))
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    return requests, problems


def parse_request(line: bytes) -> Request:
    """One line of the input; ValueError when it is something else."""
    if len(line) >= MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    history = content.get("history") if isinstance(content, dict) else None
    if not isinstance(history, list) or not all(isinstance(key, str) for key in history):
        raise ValueError('expected {"user": ..., "history": [item keys as strings, ...]}')
    user = content.get("user")
    try:
        json.dumps(user, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the user cannot be written again ({error})") from error
    return Request(user, history)


def read_item_keys(path: Path | None) -> frozenset[str] | None:
    """The item keys of a file with one per line, blank lines passed over; None of no file.

    Raises:
        InputError: if the file cannot be read, or is not UTF-8.
    """
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}. Give a text file with one item key per line.") from error
    return frozenset(line for line in lines if line.strip())
