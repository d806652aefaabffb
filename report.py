"""One page on a training run, or on several side by side.

    python report.py runs/demo                                # report.html, to be opened in any browser
    python report.py runs/beauty runs/beauty_wide --output compared.html

The page says whether a run finished and how good it is, and shows curves, final metrics, the settings that differ, and
on what it ran. It needs no network and no other file. Runs that are still training or damaged are shown as far as they
can be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluate import check_writable, run_script


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_script(parse_arguments, report, argv)


def report(args: argparse.Namespace) -> int:
    """Read the runs and write the page; returns the exit code."""
    from reports.runs.report import write_run_report

    check_writable(args.output, "--output")
    write_run_report(args.output, args.runs)
    print(args.output)
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="report.py", description="One page on a run, or on several side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder: a save_dir_root of training")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
