"""Output written block by block into a part that survives a kill: the next run goes on behind its last whole block.

Beside the output FILE lies, until it is whole, the folder .FILE.part. In it process number r of a run has

r.json      what the run was asked for; a run that is asked for something else does not go on with it
r.out       the text of its blocks
r.blocks    one JSON line per whole block: where it ends in the input and in r.out, and what it has come to
r.done      its numbers, once it has no block left
r.lock      locked while it lives
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import replace_file, sync_folder
from data.schemas import InputError
from serving.answers import Answer
from serving.jsonl import Problem

MAX_SHOWN_PROBLEMS = 10
LOCK_PATIENCE = 10.0
"""Seconds; others look at a lock by taking it for a moment."""

_ALWAYS_ONCE = {"ranker": "generative"}
"""What every run was asked for before there was a choice, which its part does not name."""


@dataclass(frozen=True)
class BlockRecord:
    """A whole block of a part.

    Attributes:
        index: of the block.
        input_end: where the input goes on behind it.
        output_end: bytes of the part up to its end.
        num_histories: lines that were answered.
        num_problems: lines that could not be used.
        problems: the first few of those.
    """

    index: int
    input_end: int
    output_end: int
    num_histories: int
    num_problems: int
    problems: list[Problem]

    @classmethod
    def from_json(cls, line: bytes) -> "BlockRecord":
        """Read one line of r.blocks; ValueError, TypeError or KeyError when it is none."""
        fields = json.loads(line)
        return cls(**{**fields, "problems": [Problem(*problem) for problem in fields["problems"]]})


@dataclass
class Tally:
    """What a run has come to: histories answered, lines that could not be used, and the first few of those."""

    num_histories: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, num_histories: int, num_problems: int, problems: list[Problem]) -> None:
        """Count one more block; blocks come in the order of the input."""
        self.num_histories += num_histories
        self.num_problems += num_problems
        self.problems += problems[: MAX_SHOWN_PROBLEMS - len(self.problems)]


class Part:
    """What one process of a run writes; see `open_part`.

    Attributes:
        output: the file that comes of it.
        rank: number of the process, from 0.
        identity: what the run was asked for.
        last: the last whole block, None before the first.
        num_ranked: histories answered since the part was opened.
    """

    def __init__(self, output: Path, rank: int, identity: dict[str, Any]) -> None:
        self.output = output
        self.rank = rank
        self.identity = identity
        self.num_ranked = 0
        self.last = self._whole_blocks()
        self._text = self.path("out").open("ab")
        self._blocks = self.path("blocks").open("ab")

    @property
    def folder(self) -> Path:
        """Of the parts of all processes."""
        return parts_folder(self.output)

    def path(self, kind: str, rank: int | None = None) -> Path:
        """One of the files that the module describes, of this process or of another."""
        return self.folder / f"{self.rank if rank is None else rank}.{kind}"

    def append(self, index: int, input_end: int, answer: Answer) -> None:
        """Add a block; it counts once its line in r.blocks is whole."""
        data = answer.text.encode()
        self._text.write(data)
        self._text.flush()
        os.fsync(self._text.fileno())
        self.last = BlockRecord(
            index,
            input_end,
            (self.last.output_end if self.last else 0) + len(data),
            answer.num_histories,
            len(answer.problems),
            answer.problems[:MAX_SHOWN_PROBLEMS],
        )
        self._blocks.write(json.dumps(asdict(self.last)).encode() + b"\n")
        self._blocks.flush()
        self.num_ranked += answer.num_histories

    def finish(self, num_blocks: int) -> None:
        """Tell the others that no block is left, of `num_blocks` that the input has."""
        replace_file(self.path("done"), json.dumps({"num_blocks": num_blocks, "num_ranked": self.num_ranked}))

    def records(self, rank: int) -> Iterator[BlockRecord]:
        """The whole blocks of a process, in order."""
        return (record for record, _ in _records(self.path("blocks", rank)))

    def publish(self, merged: Path) -> None:
        """Give a file of the folder the output's name, and remove the folder."""
        os.replace(merged, self.output)
        sync_folder(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder, with the parts of all processes.

        The blocks go first, so that a kill meanwhile leaves nothing that binds the next run. The others leave as their
        r.done goes: their locks are out of the way by then, and nothing is removed that the next run has made.
        """
        order, own_lock = {".blocks": 0, ".json": 2, ".lock": 3, ".done": 4}, self.path("lock")
        for path in sorted(
            self.folder.glob("*"), key=lambda path: 5 if path == own_lock else order.get(path.suffix, 1)
        ):
            with suppress(OSError):
                path.unlink()
        _remove_if_empty(self.folder)

    def close(self) -> None:
        """Close the files."""
        self._text.close()
        self._blocks.close()

    def _whole_blocks(self) -> BlockRecord | None:
        """Cut off what a kill has left half, and return the last whole block."""
        text, blocks = self.path("out"), self.path("blocks")
        num_bytes = text.stat().st_size if text.is_file() else 0
        last, kept = None, 0
        for record, end in _records(blocks):
            if record.output_end > num_bytes:
                break
            last, kept = record, end
        for path, size in ((blocks, kept), (text, last.output_end if last else 0)):
            with path.open("ab") as file:
                file.truncate(size)
        return last


@contextmanager
def open_part(output: Path, rank: int, identity: dict[str, Any], *, restart: bool) -> Iterator[Part]:
    """The part of one process, continued where an earlier run was killed; nobody else may write it meanwhile.

    A part without a whole block is removed in the end.

    Args:
        output: the file that shall come of it.
        rank: number of the process.
        identity: what the run is asked for, as JSON can hold it.
        restart: remove what an earlier run has left.

    Raises:
        InputError: if another process writes the part, or an earlier run was asked for something else.
    """
    folder = parts_folder(output)
    with locked(folder, rank, output) as lock:
        try:
            _prepare(folder, rank, identity, output, restart=restart)
            with closing(Part(output, rank, identity)) as part:
                yield part
        finally:  # once the parts are discarded, what lies there is another run's
            if _is_at(lock, folder / f"{rank}.lock") and not any(_records(folder / f"{rank}.blocks")):
                _remove(folder, rank)


def _prepare(folder: Path, rank: int, identity: dict[str, Any], output: Path, *, restart: bool) -> None:
    """Keep what an earlier run has left of the same request, and nothing else."""
    if restart:
        _remove_files(folder, rank)
    (folder / f"{rank}.done").unlink(missing_ok=True)
    if any(_records(folder / f"{rank}.blocks")):
        _check_identity(folder / f"{rank}.json", identity, output)
    else:
        _remove_files(folder, rank)
    replace_file(folder / f"{rank}.json", json.dumps(identity, indent=2))


def parts_folder(output: Path) -> Path:
    """Where the parts of an output lie until it is whole."""
    return output.with_name(f".{output.name}.part")


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock; one that does not exist is not held."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, rank: int, output: Path) -> Iterator[int]:
    """The descriptor of the lock that is held meanwhile (InputError where another process holds it)."""
    descriptor, given_up = None, time.monotonic() + LOCK_PATIENCE
    while (descriptor := _lock(folder, rank)) is None:
        if time.monotonic() > given_up:
            raise InputError(f"another process is writing {output}. Wait for it, or choose another --output.")
        time.sleep(0.05)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # which unlocks it


def _lock(folder: Path, rank: int) -> int | None:
    """The descriptor of a lock that is held now, or None where somebody else holds it or has just removed it."""
    path = folder / f"{rank}.lock"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # an earlier run has removed the folder just now
        return None
    if _try_lock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is the one that has that name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _records(path: Path) -> Iterator[tuple[BlockRecord, int]]:
    """The whole lines of a r.blocks, and where they end."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                yield BlockRecord.from_json(line), end
            except (ValueError, TypeError, KeyError):  # torn by a power failure
                return


def _check_identity(path: Path, identity: dict[str, Any], output: Path) -> None:
    try:
        earlier = _ALWAYS_ONCE | json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    other = [f"{name} was {earlier.get(name)!r}, now {value!r}" for name, value in identity.items()
             if earlier.get(name) != value]  # fmt: skip
    if other:
        raise InputError(
            f"{path.parent} holds the beginning of {output} from an earlier run that was asked for something else: "
            f"{'; '.join(other)}. Ask for the same to continue it, or give --restart to start anew."
        )


def _remove_files(folder: Path, rank: int) -> None:
    """The files of one process, but for its lock."""
    for kind in ("done", "blocks", "out", "json"):
        (folder / f"{rank}.{kind}").unlink(missing_ok=True)


def _remove(folder: Path, rank: int) -> None:
    """The files of one process, and the folder where it was the last one."""
    _remove_files(folder, rank)
    (folder / f"{rank}.lock").unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # others have files there, or it is gone already
        folder.rmdir()
