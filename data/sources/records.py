"""Reading files that others wrote: compressed or plain lines, each a JSON object or a Python dict literal.

A line that cannot be read is skipped and counted; past one percent the file is refused.
"""

import ast
import gzip
import html
import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data.schemas import InputError

MAX_MALFORMED_SHARE = 0.01

_logger = logging.getLogger(__name__)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream of the file, decompressed where its name ends in .gz.

    Raises:
        InputError: if the file is missing, truncated, or not gzip.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is truncated or damaged ({error}). Delete it and fetch it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}). Check DatasetConfig.raw_dir.") from error


def line_blocks(path: Path, block_size: int = 1 << 26) -> Iterator[bytes]:
    """The file's bytes in blocks that end at line ends; raises as `opened` does."""
    with opened(path) as stream:
        rest = b""
        while chunk := stream.read(block_size):
            end = chunk.rfind(b"\n") + 1
            if end:
                yield rest + chunk[:end]
                rest = chunk[end:]
            else:
                rest += chunk
        if rest:
            yield rest


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """A JSON object or Python dict literal, None when the line is neither. Nothing in the line is executed."""
    text = line.decode("utf-8", errors="replace") if isinstance(line, bytes) else line
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return record if isinstance(record, dict) else None


def clean_text(text: Any) -> str | None:
    """Text without HTML entities and line breaks, None where nothing is left or the value is no text."""
    if not isinstance(text, str):
        return None
    return " ".join(html.unescape(whole_characters(text)).split()) or None


def clean_price(price: Any) -> float | None:
    """A price, None where the value is none: no number, negative, infinite, NaN, or a million and more."""
    is_number = isinstance(price, int | float) and not isinstance(price, bool)
    return float(price) if is_number and 0 <= price < 1e6 else None


def whole_characters(text: str) -> str:
    """The text with characters in place of surrogate pairs, as narrow builds of Python 2 wrote them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_malformed(path: Path, num_malformed: int, num_lines: int) -> None:
    """Warns about skipped lines.

    Raises:
        InputError: if more than one percent of the lines had to be skipped.
    """
    if num_malformed > MAX_MALFORMED_SHARE * num_lines:
        raise InputError(
            f"{path}: {num_malformed} of {num_lines} lines are malformed, at most {MAX_MALFORMED_SHARE:.0%} may be. "
            "Expected one JSON object or Python dict a line, with its item key; fetch the file again."
        )
    if num_malformed:
        _logger.warning("%s: skipped %d malformed of %d lines", path, num_malformed, num_lines)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds; InputError when it is truncated or holds something else."""
    with opened(path) as stream:
        try:
            content = json.loads(stream.read())
        except ValueError as error:
            raise InputError(f"{path} is truncated or not JSON ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} expected a JSON object, got {type(content).__name__}. Fetch the file again.")
    return content


def check_ends_with_newline(path: Path) -> None:
    """InputError when the file's last line was cut."""
    with opened(path) as stream:
        stream.seek(0, 2)
        size = stream.tell()
        stream.seek(max(0, size - 1))
        last = stream.read(1)
    if last != b"\n":
        raise InputError(f"{path} is truncated: its last line has no end ({size} bytes). Fetch the file again.")
