"""Records a finished run as a result: metrics of every ranker, what made them, and every user's rank.

    python -m benchmarks.training_run RUN_FOLDER --tokenizer-run FOLDER --name beauty_first_run

Writes `benchmarks/results/<device>/NAME.json`, and beside it NAME.gin (the config as given) and NAME.ranks.safetensors
(`ranks/{ranker}`, `targets`, `rows` of the test role), from which any metric can be computed again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result
from data.files import without_paths
from data.schemas import InputError
from training.cli import run_cli


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.training_run", description="Record a finished run as a result.")
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="of train_decoder.py")
    parser.add_argument("--tokenizer-run", type=Path, required=True, metavar="FOLDER", help="of train_rqvae.py")
    parser.add_argument("--name", required=True, help="of the result")
    arguments = parser.parse_args(argv)
    rows = [_about(arguments.run, arguments.tokenizer_run), *_ranker_rows(_read(arguments.run / "metrics.json"))]
    path = write_result(arguments.name, rows)
    path.with_suffix(".gin").write_text(
        without_paths((arguments.run / "config.gin").read_text(encoding="utf-8")), encoding="utf-8"
    )
    shutil.copyfile(arguments.run / "ranks_test.safetensors", path.with_suffix(".ranks.safetensors"))
    print_table(rows[1:])
    print(f"written to {path}")
    return 0


def _about(run: Path, tokenizer_run: Path) -> dict[str, Any]:
    """How the run came about: command, commit, seed, hardware, time, and the tokenizer it stands on."""
    environment, metrics = _read(run / "env.json"), _read(run / "metrics.json")
    tokenizer = _read(tokenizer_run / "metrics.json")
    return {
        "case": "run",
        **{key: environment[key] for key in ("commit", "seed", "hardware", "versions", "data_manifest_hash")},
        "command": without_paths(environment["command"]),
        **{key: metrics[key] for key in ("steps", "best_step", "seconds")},
        "tokenizer": {key: value for key, value in tokenizer.items() if isinstance(value, int | float)},
    }


def _ranker_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per ranker, role and slice."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) == 4:
            ranker, role, part, metric = parts
            row = rows.setdefault((ranker, role, part), {"case": f"{role}/{part}", "implementation": ranker})
            row[metric] = value
    return list(rows.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Give the folder of a finished run.") from error


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
