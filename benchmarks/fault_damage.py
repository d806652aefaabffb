"""What else happens to a run besides kills: damage on the disk, disks that refuse, people who change their minds.

Every case takes a copy of one interrupted run, does the harm, and looks at what the training script makes of it: a
clear error with exit code 2 or a resume, and in the end what the uninterrupted run came to.
"""

import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.fault_lives import Life
from benchmarks.fault_runs import DemoRun, FaultError, Outcome, finish, require_outcome, require_success

_PATIENCE_SECONDS = 300
_FELL_BACK, _HARMLESS = "detected, went on from the one before", "harmless"


class SkippedError(Exception):
    """A case that this machine does not allow; the message says why."""


@dataclass(frozen=True)
class Victim:
    """What cases begin with.

    Attributes:
        run: interrupted in the middle of its second stage, with two checkpoints.
        expected: outcome of the uninterrupted run.
        folder: for copies.
        chance: moments, bits and lengths.
    """

    run: DemoRun
    expected: Outcome
    folder: Path
    chance: random.Random

    def copy(self) -> DemoRun:
        """A copy to do harm to."""
        return self.run.copy(Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder)))


Case = Callable[[Victim], tuple[int, str]]
"""Harms copies of the victim; returns how many and what came of it.

Raises:
    FaultError: if anything came of it that must not.
    SkippedError: if this machine does not allow it.
"""


def damage_cases(*, quick: bool) -> dict[str, Case]:
    """Every case by name, the longest first."""
    return {
        "flipped bits": partial(flipped_bits, flips=8 if quick else 100),
        "truncated files": partial(truncated_files, lengths=1 if quick else 6),
        "full disk": partial(full_disk, sizes=1 if quick else 4),
        "other config": other_config,
        "SIGTERM": partial(interrupted, number=signal.SIGTERM),
        "Ctrl-C": partial(interrupted, number=signal.SIGINT),
        "two programs in a folder": two_programs,
        "read-only while training": read_only_while_training,
        "read-only from the start": read_only_at_the_start,
        "file size limit": file_size_limit,
        "other data set": other_data,
        "every checkpoint damaged": nothing_whole,
    }


def interrupt(run: DemoRun, number: int) -> None:
    """Send a signal to a run whose second stage has two checkpoints or more, one of them written in this life."""
    life, before = run.live(), set(run.checkpoints())
    _wait(life, lambda: len(run.checkpoints()) >= 2 and bool(set(run.checkpoints()) - before))
    life.signal(number)
    code = life.end()
    if code != 130 or "continue with --resume auto" not in life.printed():
        raise FaultError(f"signal {number} gave exit code {code}: {life.last_words()}")


def interrupted(victim: Victim, *, number: int) -> tuple[int, str]:
    """A signal ends a run with exit code 130 and a checkpoint, from which it goes on."""
    run = victim.copy()
    interrupt(run, number)
    finish(run, victim.expected)
    run.remove()
    return 1, "exit code 130; resumed, equal"


def truncated_files(victim: Victim, *, lengths: int) -> tuple[int, str]:
    """Every file of the newest checkpoint, cut at several lengths."""
    seen: Counter[str] = Counter()
    for path in sorted(victim.run.checkpoints()[0].iterdir()):
        size = path.stat().st_size
        cuts = [size // 2, 0, size - 1, 1, *(victim.chance.randrange(size) for _ in range(lengths))]
        for number, cut in enumerate(cuts[:lengths]):
            seen[_damaged(victim, path.name, partial(_cut, size=cut), to_the_end=number == 0)] += 1
    return seen.total(), _counts(seen)


def flipped_bits(victim: Victim, *, flips: int) -> tuple[int, str]:
    """One bit of one file of the newest checkpoint, drawn over the files and then over their bits."""
    seen: Counter[str] = Counter()
    names = sorted(path.name for path in victim.run.checkpoints()[0].iterdir())
    for number in range(flips):
        name = names[number % len(names)]
        seen[_damaged(victim, name, partial(_flip, chance=victim.chance), to_the_end=number < len(names))] += 1
    return seen.total(), _counts(seen)


def _cut(file: Path, *, size: int) -> None:
    os.truncate(file, size)


def _flip(file: Path, *, chance: random.Random) -> None:
    bit = chance.randrange(8 * file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


def _damaged(victim: Victim, name: str, harm: Callable[[Path], None], *, to_the_end: bool) -> str:
    """What a resume does after harm to a file of the newest checkpoint."""
    run = victim.copy()
    newest, before = run.checkpoints()[:2]
    harm(newest / name)
    life = run.live()
    _wait(life, lambda: _resumed(run, life) or not life.alive())
    printed = life.printed()
    if f"skipping the damaged checkpoint {newest}" in printed and f"resumed from {before}" in printed:
        seen = _FELL_BACK
    elif f"resumed from {newest}" in printed and name == "manifest.json":
        seen = _HARMLESS  # all else is compared with what the manifest says
    else:
        life.kill()
        raise FaultError(f"damage to {name}: {life.last_words()}. See {run.root}")
    if to_the_end:
        require_success(life)
        require_outcome(run, victim.expected)
    else:
        life.kill()
    run.remove()
    return seen


def nothing_whole(victim: Victim) -> tuple[int, str]:
    """All checkpoints are damaged."""
    run = victim.copy()
    for path in run.checkpoints():
        os.truncate(path / "state.pt", 1000)
    _refused(run, "none is whole")
    run.remove()
    return 1, "refused"


def full_disk(victim: Victim, *, sizes: int) -> tuple[int, str]:
    """A small file system, with room for this or that share of one more checkpoint."""
    checkpoint = sum(path.stat().st_size for path in victim.run.checkpoints()[0].iterdir())
    for number in range(sizes):
        with _small_disk(victim.folder) as disk:
            run = victim.run.copy(disk)
            room = int(checkpoint * (number + 0.5) / sizes)
            _remount(disk, size=_blocks(disk) + room)
            _refused(run, "the disk is full")
            _remount(disk, size=2**30)
            finish(run, victim.expected)
    return sizes, "refused, the checkpoints before whole; resumed in more room, equal"


def file_size_limit(victim: Victim) -> tuple[int, str]:
    """No file may become as large as a checkpoint, as under a quota."""
    run = victim.copy()
    limit = (run.checkpoints()[0] / "state.pt").stat().st_size // 2
    _refused(run, "the file size limit is reached", file_size_limit=limit)
    finish(run, victim.expected)
    run.remove()
    return 1, "refused, the checkpoints before whole; resumed without it, equal"


def read_only_while_training(victim: Victim) -> tuple[int, str]:
    """The folder of checkpoints becomes read-only in the middle of training."""
    run = victim.copy()
    life = run.live()
    _wait(life, lambda: _resumed(run, life))
    with _read_only(run.model / "checkpoints"):
        _require_refusal(run, life, "the file system is read-only")
    finish(run, victim.expected)
    run.remove()
    return 1, "refused, the checkpoints before whole; resumed when writable, equal"


def read_only_at_the_start(victim: Victim) -> tuple[int, str]:
    """The run folder is read-only from the start."""
    run = victim.copy()
    with _read_only(run.model):
        _refused(run, "the file system is read-only")
    finish(run, victim.expected)
    run.remove()
    return 1, "refused; resumed when writable, equal"


def other_data(victim: Victim) -> tuple[int, str]:
    """Going on with another data set."""
    run = victim.copy()
    _refused(run, "was trained on other data", "--gin.DatasetConfig.seed=1")
    finish(run, victim.expected)
    run.remove()
    return 1, "refused; resumed with its own, equal"


def other_config(victim: Victim) -> tuple[int, str]:
    """Going on with other settings."""
    changed = "--gin.decoder/LoopConfig.learning_rate=1e-3"
    run = victim.copy()
    _refused(run, "learning_rate", changed)
    finish(run, victim.expected)
    run.remove()
    told = victim.copy()
    if "learning_rate" not in finish(told, None, changed, "--allow-changes"):
        raise FaultError(f"--allow-changes does not say what has changed. See {told.root}")
    told.remove()
    return 1, "listed and refused; resumed with its own, equal; taken with --allow-changes"


def two_programs(victim: Victim) -> tuple[int, str]:
    """A second program in the folder of one that is training."""
    run = victim.copy()
    first = run.live()
    _wait(first, lambda: _resumed(run, first))
    second = Life(run.arguments(), run.root / "second.log")
    if second.end() != 2 or "another program is training" not in second.printed():
        raise FaultError(f"a second program was let in: {second.last_words()}. See {run.root}")
    require_success(first)
    require_outcome(run, victim.expected)
    run.remove()
    return 1, "the second refused, the first equal"


def _refused(run: DemoRun, reason: str, *more: str, file_size_limit: int | None = None) -> None:
    _require_refusal(run, run.live(*more, file_size_limit=file_size_limit), reason)


def _require_refusal(run: DemoRun, life: Life, reason: str) -> None:
    """A life must end with one line of error that says why, and leave whole what was whole."""
    code = life.end()
    words = life.last_words()
    if code != 2 or reason not in words or "Traceback" in life.printed():
        raise FaultError(f"expected exit code 2 and {reason!r}, got {code}: {words}. See {run.root}")
    if reason != "none is whole" and (not run.checkpoints() or run.damaged()):
        raise FaultError(f"no whole checkpoint is left in {run.root}")


def _resumed(run: DemoRun, life: Life) -> bool:
    """Whether a life has begun the second stage of a run."""
    return run.model in run.began(life.printed())


def _wait(life: Life, condition: Callable[[], bool]) -> None:
    """FaultError if the life ends first, unless the condition allows for that."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if not life.alive() and not condition():
            raise FaultError(f"a life ended too early: {life.last_words()}")
        if time.monotonic() > end:
            life.kill()
            raise FaultError(f"a life hangs: {life.last_words()}")
        time.sleep(0.005)


def _counts(seen: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in seen.most_common())


@contextmanager
def _small_disk(parent: Path) -> Iterator[Path]:
    """A folder that is a file system of its own, in memory; removed with all that is in it."""
    folder = Path(tempfile.mkdtemp(prefix="disk-", dir=parent))
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _remount(folder: Path, *, size: int) -> None:
    _mount("-o", f"remount,size={size}", str(folder))


def _blocks(folder: Path) -> int:
    """Bytes in use on the file system of a folder."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """The folder's own content, mounted over it so that nobody can write there."""
    _mount("--bind", "-o", "ro", str(folder), str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise SkippedError(f"mounting is not possible here: {detail}") from error
