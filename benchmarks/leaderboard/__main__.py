"""Trains and evaluates models alike and puts them into one table, with intervals, costs and plots.

    python -m benchmarks.leaderboard --dataset beauty --models popularity item_knn sasrec tiger liger --minutes 45
    python -m benchmarks.leaderboard --dataset beauty --models sasrec liger --seeds 0 1 2 --split liger
    python -m benchmarks.leaderboard --dataset demo --models popularity tiger --quick     # offline, minutes
    python -m benchmarks.leaderboard --dataset beauty --recompute         # proves the published numbers from the ranks

Every model is trained by its own script and config in a process of its own, one after the other; --minutes is the
training time that each may take, on as many --threads. Validation chooses the weights, and the test users are read
once, at the end, by the script. A stopped board goes on where it was when it is started again: finished runs are kept,
others resume.

OUTPUT gets the runs (OUTPUT/runs/MODEL/seed_N, and a log beside each), the table as Markdown and a page with plots.
`benchmarks/results/<device>/leaderboard/` gets the numbers (NAME.json) and every user's rank (NAME.ranks.safetensors),
from which `--recompute` computes each of them again; NAME is the data set, followed by the split, the features and
`quick` where they are not the usual ones. Exit code 1 says that a run failed, or that a number does not follow.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import begin, device_name, envelope, parser
from benchmarks.leaderboard.board import build_rows, recomputed
from benchmarks.leaderboard.facts import collect, read_json
from benchmarks.leaderboard.models import DATASETS, MODELS, find_configs
from benchmarks.leaderboard.runs import BoardSettings, Command, Run, plan_runs, run_all
from benchmarks.leaderboard.saved import SavedRanks
from data.files import cannot_write, replace_file, without_paths
from data.processed import SPLIT_NAMES
from data.schemas import InputError
from reports.leaderboard.report import write_leaderboard
from training.cli import run_cli

PUBLISHED = Path(__file__).with_name("published.json")
RANKS = ".ranks.safetensors"


def main(argv: Sequence[str], *, command: Command | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name.
        command: runs Python with arguments, a log file and more environment; None starts a process.
    """
    arguments = _parser().parse_args(argv)
    name = board_name(arguments)
    if arguments.recompute:
        return _recompute(arguments.results, name)
    if not arguments.models:
        raise InputError(f"--models is missing: name one or more of {', '.join(MODELS)}.")
    settings = BoardSettings(
        dataset=arguments.dataset,
        split=arguments.split,
        seeds=tuple(dict.fromkeys(arguments.seeds)),
        threads=arguments.threads,
        minutes=arguments.minutes,
        raw_dir=arguments.raw_dir,
        root=arguments.root,
        text_model=arguments.text_model,
        quick=arguments.quick,
        device=begin(arguments),
    )
    output = (arguments.output or Path("runs") / "leaderboard" / name).resolve()
    configs = find_configs(dict.fromkeys(arguments.models), arguments.dataset, arguments.features)
    runs = plan_runs(configs, settings, output / "runs")
    failures = run_all(runs, settings, command=command)
    finished = [run for run in runs if run.finished]
    failed = [f"{failure.run.name}, seed {failure.run.seed}: {failure.error}" for failure in failures]
    if finished:
        _publish(name, finished, failed, settings, arguments, output)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.prog = "python -m benchmarks.leaderboard"
    made.add_argument("--dataset", required=True, choices=DATASETS)
    made.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="one training per seed (0)")
    made.add_argument("--minutes", type=float, help="of training per run; without it, what each config says")
    made.add_argument("--split", choices=SPLIT_NAMES, default=SPLIT_NAMES[0])
    made.add_argument("--features", metavar="NAME", help="configs whose names end so, such as minilm")
    made.add_argument("--output", type=Path, metavar="FOLDER", help="runs, table and page (runs/leaderboard/NAME)")
    made.add_argument("--raw-dir", type=Path, metavar="FOLDER", help="local raw files of the data set")
    made.add_argument("--root", type=Path, metavar="FOLDER", help="prepared data and features (dataset)")
    made.add_argument("--text-model", type=Path, metavar="FOLDER", help="local copy of the text encoder")
    made.add_argument("--recompute", action="store_true", help="compute a published board again from its saved ranks")
    return made


def board_name(arguments: argparse.Namespace) -> str:
    """Of the files: the data set, and whatever is not as usual."""
    split = None if arguments.split == SPLIT_NAMES[0] else arguments.split
    parts = [arguments.dataset, split, arguments.features, "quick" if arguments.quick else None]
    return "-".join(part for part in parts if part)


def _publish(
    name: str,
    runs: Sequence[Run],
    failed: Sequence[str],
    settings: BoardSettings,
    arguments: argparse.Namespace,
    output: Path,
) -> None:
    """Write the ranks, the numbers, the table and the page of finished runs."""
    saved, facts, protocol = collect(runs, settings)
    told = {
        "dataset": settings.dataset,
        "split": settings.split,
        "features": arguments.features,
        "protocol": protocol,
        "seeds": list(settings.seeds),
        "minutes": settings.minutes,
        "threads": settings.threads,
        "quick": settings.quick,
        "failed": [without_paths(line) for line in failed],
    }
    rows = [*build_rows(told, facts, saved), *_published(settings.dataset)]
    about = envelope(f"leaderboard/{name}", rows, device=settings.device)
    folder = arguments.results / device_name(settings.device) / "leaderboard"
    saved.save(folder / f"{name}{RANKS}")
    path = folder / f"{name}.json"
    try:
        replace_file(path, json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
    written = write_leaderboard(output, name, rows, about=about)
    print(f"\n{written[0].read_text(encoding='utf-8')}\nwritten to {', '.join(map(str, [path, *written]))}")


def _published(dataset: str) -> list[dict[str, Any]]:
    """Rows from papers."""
    return [{"case": "published", **row} for row in read_json(PUBLISHED)[dataset]]


def _recompute(results: Path, name: str) -> int:
    """Compute the boards of this name, of every device, again; returns 1 where a number does not follow."""
    paths = sorted(results.glob(f"*/leaderboard/{name}.json"))
    if not paths:
        there = sorted({path.stem for path in results.glob("*/leaderboard/*.json")})
        raise InputError(f"no board {name} in {results}. There are: {', '.join(there) or 'none'}.")
    different = False
    for path in paths:
        rows = read_json(path).get("rows", [])
        problems = recomputed(rows, SavedRanks.load(path.with_name(f"{name}{RANKS}")))
        for problem in problems:
            print(f"{path}: {problem}", file=sys.stderr)
        measured = sum(row["case"] == "measured" for row in rows)
        verdict = f"{len(problems)} numbers DIFFER" if problems else "every number follows from the saved ranks"
        print(f"{path}: {measured} rows computed again: {verdict}")
        different |= bool(problems)
    return int(different)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
