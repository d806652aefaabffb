"""The kill campaign: lives of the demo's training that end by SIGKILL, until enough of them have.

A round trains the demo from nothing, through as many lives as it takes; then all that it has come to is compared with
an uninterrupted run. Some kills come at a moment drawn over the length of a run. The others are aimed: a few
milliseconds after the temporary name of a checkpoint, or of an artifact, appears. Where a kill landed is told by what
it left on the disk and by the stacks of the life's threads.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

from benchmarks.fault_lives import Frame, Life
from benchmarks.fault_runs import DemoRun, FaultError, Leftovers, Outcome, require_outcome, require_success

IN_A_WRITE = "checkpoint write"
SHARE_IN_WRITES = 0.2
"""Of the kills; a campaign goes on until so many at least have landed inside the write of a checkpoint."""

_AT_CHECKPOINTS, _AT_ARTIFACTS = 0.5, 0.1
_WRITES_BEFORE = (0, 0, 1, 3)
_POLL_SECONDS = 0.001
_LOOK_SECONDS = 0.02
_ENOUGH_FAILURES = 3
_PLACES = {
    "start of a stage, resuming": ("loop.py:_chosen", "loop.py:_begin_after", "run_folder.py:"),
    "evaluation in training": ("loop.py:_evaluate",),
    "before or after a checkpoint write": ("training/checkpoint", "loop.py:_save"),
    "training step": ("loop.py:_step",),
    "rest of the loop": ("loop.py:",),
    "before or after an artifact write": (":save_pretrained", ":save_model_artifact"),
    "final evaluation and reports": ("evaluator.py:", "baselines/", "reports/", ":_report"),
    "codebooks, semantic ids": ("tasks/rqvae.py:", "tokenizer.py:"),
    "data and features": ("processed.py:", "features.py:", "item_sets.py:", "batching.py:"),
}
"""Where a kill landed, by its frames: the first place of which a frame holds one of the names (file:function)."""


@dataclass(frozen=True)
class Pace:
    """How long an uninterrupted run takes, and the write of a checkpoint in it."""

    seconds: float
    write_seconds: float


@dataclass
class Tally:
    """What a campaign has seen.

    Attributes:
        places: kills by where they landed.
        lives: scripts started.
        rounds: trainings from nothing to the end.
        failures: what must not happen, each with the seed, the kill and the folder.
    """

    places: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    rounds: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Lives that were killed."""
        return self.places.total()

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            places=self.places + other.places,
            lives=self.lives + other.lives,
            rounds=self.rounds + other.rounds,
            failures=self.failures + other.failures,
        )


def measure_pace(run: DemoRun) -> Pace:
    """Let a new run go to its end and look on."""
    Life(["--help"], run.log).end()  # the server of lives starts
    started, life = time.monotonic(), run.live()
    writing, began, writes = _writing_checkpoint(run), 0.0, []
    while life.alive():
        now, busy = time.monotonic(), writing()
        if busy and not began:
            began = now
        elif began and not busy:
            writes.append(now - began)
            began = 0.0
        time.sleep(_POLL_SECONDS)
    require_success(life)
    return Pace(time.monotonic() - started, sorted(writes)[len(writes) // 2])


def kill_campaign(folder: Path, run: DemoRun, expected: Outcome, pace: Pace, *, kills: int, seed: str) -> Tally:
    """Kill lives until enough of them have died so, and let the last round end in peace.

    Args:
        folder: for the rounds; that of a round with a failure is kept.
        run: uninterrupted.
        expected: its outcome.
        pace: of that run.
        kills: how many, or more, see SHARE_IN_WRITES.
        seed: of the moments.
    """
    tally, chance = Tally(), random.Random(seed)
    while not _enough(tally, kills) and len(tally.failures) < _ENOUGH_FAILURES:
        again = run.anew(folder / f"round-{tally.rounds}")
        try:
            _round(again, tally, chance, pace, kills)
            require_outcome(again, expected)
        except (FaultError, TimeoutError) as error:
            tally.failures.append(f"seed {seed}, kill {tally.kills}: {error}. See {again.root}")
        else:
            again.remove()
        tally.rounds += 1
        print(
            f"{folder.name}: {tally.kills} of {kills} kills, {tally.places[IN_A_WRITE]} in a {IN_A_WRITE}", flush=True
        )
    return tally


def _enough(tally: Tally, kills: int) -> bool:
    return tally.kills >= kills and tally.places[IN_A_WRITE] >= int(SHARE_IN_WRITES * kills)


def _round(run: DemoRun, tally: Tally, chance: random.Random, pace: Pace, kills: int) -> None:
    """One training from nothing to the end, killed again and again."""
    left: Leftovers = {}
    while True:
        life = run.live()
        tally.lives += 1
        left = _watch(run, life, _moment(run, chance, pace) if not _enough(tally, kills) else repeat(False), left)
        frames, found = life.kill(), run.leftovers()
        if life.end() != -signal.SIGKILL:  # it was faster
            require_success(life)
            if found:
                raise FaultError(f"a finished run holds {run.names(found)}")
            return
        tally.places[_place(frames, [path for path in found if found[path] != left.get(path)])] += 1
        left = found
        if "skipping the damaged checkpoint" in life.printed():
            raise FaultError(f"life {tally.lives} met a damaged checkpoint")
        if damaged := run.damaged():
            raise FaultError(f"after the kill: {', '.join(damaged)}")


def _watch(run: DemoRun, life: Life, moment: Iterator[bool], left: Leftovers) -> Leftovers:
    """Look on until the moment comes or the life ends; returns what is still there of an earlier life's leftovers."""
    looked = 0.0
    try:
        while life.alive() and not next(moment):
            if left and time.monotonic() > looked + _LOOK_SECONDS:
                left = _stayed(run, life, left)
                looked = time.monotonic()
            time.sleep(_POLL_SECONDS)
        return _stayed(run, life, left)
    except FaultError:
        life.kill()
        raise


def _stayed(run: DemoRun, life: Life, left: Leftovers) -> Leftovers:
    """Leftovers that are still there: only those of stages that this life has not begun may be."""
    began, present = run.began(life.printed()), run.leftovers()
    stayed = {path: identity for path, identity in left.items() if present.get(path) == identity}
    if wrong := [path for path in stayed if any(path.is_relative_to(folder) for folder in began)]:
        raise FaultError(f"still there after the next start: {run.names(wrong)}")
    return stayed


def _moment(run: DemoRun, chance: random.Random, pace: Pace) -> Iterator[bool]:
    """At every call whether to kill now: inside a write, or somewhere in the length of a run."""
    aim, seconds = chance.random(), pace.write_seconds
    if aim < _AT_CHECKPOINTS:
        writing = _writing_checkpoint(run)
        for _ in range(chance.choice(_WRITES_BEFORE)):
            yield from _until(writing)
            yield from _until(lambda: not writing())
        yield from _until(writing)
    elif aim < _AT_CHECKPOINTS + _AT_ARTIFACTS:
        yield from _until(_new_names(run.stages, ".model.tmp-"))
    else:
        seconds = pace.seconds
    end = time.monotonic() + chance.uniform(0, seconds)
    yield from _until(lambda: time.monotonic() >= end)
    yield True


def _until(condition: Callable[[], bool]) -> Iterator[bool]:
    while not condition():
        yield False


def _writing_checkpoint(run: DemoRun) -> Callable[[], bool]:
    return _new_names([stage / "checkpoints" for stage in run.stages], ".")


def _new_names(folders: Sequence[Path], prefix: str) -> Callable[[], bool]:
    """Tells whether something is being written: whether a temporary name has come since the start."""

    def present() -> set[str]:
        names = set()
        for folder in folders:
            with suppress(FileNotFoundError):
                names |= {str(folder / name) for name in os.listdir(folder) if name.startswith(prefix)}
        return names

    old = present()

    def new() -> bool:
        names = present()
        old.intersection_update(names)
        return not names <= old

    return new


def _place(frames: Sequence[Frame], new: Sequence[Path]) -> str:
    """Where a kill landed."""
    spots = [f"{file}:{function}" for file, function in frames]
    resuming = any("loop.py:_chosen" in spot for spot in spots)
    if not resuming and any(path.parent.name == "checkpoints" for path in new):
        return IN_A_WRITE
    if any(path.name.startswith(".model.") for path in new):
        return "artifact write"
    for place, names in _PLACES.items():
        if any(name in spot for spot in spots for name in names):
            return place
    return "start-up and the rest"
