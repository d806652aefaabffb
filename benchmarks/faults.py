"""Claim: training gives the same model whether or not it was interrupted, and whatever happens to its disk is either
survived or refused with one clear error.

    python -m benchmarks.faults            # 200 kills and every kind of damage: ten minutes on two cores
    python -m benchmarks.faults --quick    # a few of each, a minute

The demo's training, made short, is killed at random moments and inside writes of checkpoints, and started again each
time, until its metrics, logs, ranks, weights and ids can be compared with those of an uninterrupted run: they must be
equal, bit by bit. Then checkpoints are truncated and changed, disks are filled or made read-only, data and settings are
exchanged. `--threads` says how many lives there are at a time; each computes on one thread. A kill ends a process, not
the machine: what the system has not yet written to the disk is not lost here.
"""

import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parser, print_table
from benchmarks.fault_damage import Case, SkippedError, Victim, damage_cases, interrupt
from benchmarks.fault_kills import Pace, Tally, kill_campaign, measure_pace
from benchmarks.fault_runs import QUICK_SETTINGS, SETTINGS, DemoRun, FaultError, Outcome

KILLS, QUICK_KILLS = 200, 10


def main(argv: Sequence[str]) -> int:
    """Run the campaign; returns 1, and writes no result, if anything happened that must not."""
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0, help="of moments, lengths and bits")
    arguments = options.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    rows, failures = campaign(folder, quick=arguments.quick, seed=arguments.seed, lanes=arguments.threads)
    if failures:
        print_table(rows)
        print(*failures, f"the folders are kept in {folder}", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    finish("faults", rows, arguments, "cpu")
    return 0


def campaign(folder: Path, *, quick: bool, seed: int, lanes: int) -> tuple[list[dict[str, Any]], list[str]]:
    """All of it; returns the rows of the table, and what happened that must not.

    Args:
        folder: for the runs.
        quick: shorter runs and few of them.
        seed: of moments, lengths and bits.
        lanes: lives at a time.
    """
    run = DemoRun(folder / "uninterrupted", QUICK_SETTINGS if quick else SETTINGS)
    pace = measure_pace(run)
    print(f"uninterrupted: {pace.seconds:.1f} s; a write of a checkpoint: {1000 * pace.write_seconds:.0f} ms")
    expected = run.outcome()
    with ThreadPoolExecutor(lanes) as pool:
        kills = QUICK_KILLS if quick else KILLS
        tally = _kill(folder, run, expected, pace, pool, kills=kills, seed=seed, lanes=lanes)
        damage_rows, damage_failures = _damage(folder, run, expected, pool, quick=quick, seed=seed)
    return _kill_rows(tally) + damage_rows, tally.failures + damage_failures


def _kill(
    folder: Path,
    run: DemoRun,
    expected: Outcome,
    pace: Pace,
    pool: ThreadPoolExecutor,
    *,
    kills: int,
    seed: int,
    lanes: int,
) -> Tally:
    """The kill campaign, on so many lanes at a time."""

    def lane(number: int) -> Tally:
        share = len(range(number, kills, lanes))
        return kill_campaign(folder / f"lane-{number}", run, expected, pace, kills=share, seed=f"{seed}-{number}")

    return sum(pool.map(lane, range(lanes)), Tally())


def _kill_rows(tally: Tally) -> list[dict[str, Any]]:
    rows = [
        {"case": f"killed: {place}", "implementation": "ours", "trials": count, "seen": "went on, equal in the end"}
        for place, count in tally.places.most_common()
    ]
    seen = f"{tally.lives} lives in {tally.rounds} trainings, all equal to the uninterrupted one"
    return [*rows, {"case": "killed: all", "implementation": "ours", "trials": tally.kills, "seen": seen}]


def _damage(
    folder: Path, run: DemoRun, expected: Outcome, pool: ThreadPoolExecutor, *, quick: bool, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every case on copies of one run that SIGTERM has interrupted."""
    interrupted = run.anew(folder / "interrupted")
    interrupt(interrupted, signal.SIGTERM)

    def look(name: str, case: Case) -> tuple[dict[str, Any], list[str]]:
        victim = Victim(interrupted, expected, folder, random.Random(f"{seed}-{name}"))
        row = {"case": name, "implementation": "ours"}
        try:
            trials, seen = case(victim)
            return row | {"trials": trials, "seen": seen}, []
        except SkippedError as reason:
            return row | {"trials": 0, "seen": f"skipped: {reason}"}, []
        except (FaultError, TimeoutError) as error:
            return row, [f"seed {seed}, {name}: {error}"]

    cases = damage_cases(quick=quick)
    rows, failures = zip(*pool.map(look, cases.keys(), cases.values()), strict=True)
    return list(rows), [line for lines in failures for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
