"""Several processes that write one output: block i belongs to process i % num_processes, and process 0 merges.

`torchrun` and `accelerate launch` tell a process its number. The processes meet in files alone, see `serving.parts`:
each keeps its part locked until process 0 has merged all parts, so that a dead one is known by its lock.
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from data.files import sync_file
from data.schemas import InputError
from serving.parts import Part, Tally, is_locked

START_PATIENCE = 60.0
"""Seconds that a process may begin later than another one has nothing left to do."""

STALL_PATIENCE = 3600.0
"""Seconds in which a living process must finish a block."""

_POLL_SECONDS = 0.1
_COPY_BYTES = 1 << 20


class LostProcessError(RuntimeError):
    """Another process of the run has died, has not begun, or stands still; the parts stay as they are."""


class Share(NamedTuple):
    """Which of a run's processes this is."""

    rank: int
    num_processes: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Share":
        """As RANK and WORLD_SIZE say; the only process where they are not set (InputError when they are no numbers)."""
        texts = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
            raise InputError(
                f"expected RANK below WORLD_SIZE in the environment, got RANK={texts[0]}, WORLD_SIZE={texts[1]}."
            )
        return cls(int(texts[0]), int(texts[1]))

    def owns(self, block: int) -> bool:
        """Whether a block belongs to this process."""
        return block % self.num_processes == self.rank


class HasLocks(Protocol):
    """What knows where the processes' locks lie, such as a Part."""

    def path(self, kind: str, rank: int) -> Path:
        """Of the lock of process `rank`, with kind "lock"."""


class Watch:
    """Which of the processes that this one will wait for have begun: process 0 waits for all, the others for it."""

    def __init__(self, part: HasLocks, share: Share) -> None:
        self.share = share
        self._part = part
        self._ranks = range(1, share.num_processes) if share.rank == 0 else range(1)
        self._begun: set[int] = set()

    def look(self) -> None:
        """To be called now and then, so that the death of a process is known from a late beginning."""
        for rank in self._ranks:
            self.lives(rank)

    def lives(self, rank: int) -> bool:
        """Whether a process is at work."""
        alive = is_locked(self._part.path("lock", rank))
        if alive:
            self._begun.add(rank)
        return alive

    def has_begun(self, rank: int) -> bool:
        """Whether a process has been seen at work."""
        return rank in self._begun

    def check(self, rank: int, waited: float) -> None:
        """LostProcessError of a process that is not alive and was, or should be after so many seconds."""
        if self.has_begun(rank) or waited > START_PATIENCE:
            what = "has ended early" if self.has_begun(rank) else f"has not begun after {waited:.0f} s"
            raise LostProcessError(f"process {rank} {what}. Run the same again to go on.")


def merge(part: Part, watch: Watch) -> tuple[Path, Tally, int]:
    """The parts of all processes in the order of the blocks, once they are there; for process 0.

    Returns:
        the file of all blocks, in the parts' folder; what the run has come to; and how many histories were answered
        since the processes began.

    Raises:
        LostProcessError: if one of the others has died, has not begun, or stands still.
        InputError: if one of them was asked for something else.
    """
    num_processes = watch.share.num_processes
    done = [_numbers(part, 0), *(_wait_for(part, rank, watch) for rank in range(1, num_processes))]
    tally, num_blocks = Tally(), done[0]["num_blocks"]
    num_ranked = sum(numbers["num_ranked"] for numbers in done)
    if num_processes == 1:
        for record in part.records(0):
            tally.add(record.num_histories, record.num_problems, record.problems)
        return part.path("out"), tally, num_ranked
    merged = part.folder / "merged"
    with ExitStack() as files, merged.open("wb") as target:
        texts = [files.enter_context(part.path("out", rank).open("rb")) for rank in range(num_processes)]
        records = [part.records(rank) for rank in range(num_processes)]
        for index in range(num_blocks):
            rank = index % num_processes
            record = next(records[rank])
            _copy(texts[rank], target, record.output_end - texts[rank].tell())
            tally.add(record.num_histories, record.num_problems, record.problems)
    sync_file(merged)
    return merged, tally, num_ranked


def wait_for_merge(part: Part, watch: Watch) -> None:
    """Stay until process 0 has merged the parts; for the other processes (LostProcessError when it has died)."""
    began = time.monotonic()
    while True:
        alive = watch.lives(0)
        if not part.path("done").exists():
            return
        if not alive:
            watch.check(0, time.monotonic() - began)
        time.sleep(_POLL_SECONDS)


def _wait_for(part: Part, rank: int, watch: Watch) -> dict[str, int]:
    """The numbers of another process once it has no block left."""
    since, size = time.monotonic(), -1
    while True:
        alive, waited = watch.lives(rank), time.monotonic() - since
        if watch.has_begun(rank) and part.path("done", rank).exists():
            _check_asked(part, rank)
            return _numbers(part, rank)
        if not alive:
            watch.check(rank, waited)
        if waited > STALL_PATIENCE:
            raise LostProcessError(f"process {rank} has finished no block for {waited:.0f} s.")
        if (grown := _size(part.path("blocks", rank))) != size:
            since, size = time.monotonic(), grown
        time.sleep(_POLL_SECONDS)


def _check_asked(part: Part, rank: int) -> None:
    asked = json.loads(part.path("json", rank).read_text(encoding="utf-8"))
    if asked != part.identity:
        raise InputError(f"process {rank} was asked for something else: {asked}, not {part.identity}.")


def _numbers(part: Part, rank: int) -> dict[str, int]:
    return json.loads(part.path("done", rank).read_text(encoding="utf-8"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes > 0:
        data = source.read(min(num_bytes, _COPY_BYTES))
        if not data:
            raise LostProcessError(f"{source.name} is shorter than its blocks say. Give --restart to start anew.")
        target.write(data)
        num_bytes -= len(data)
