"""A page on one run, or on several side by side: did it finish, how good is it, what differed, on what it ran.

The page needs no network and no other file; everything on it is read from run folders, also of runs that are damaged
or still training.
"""

from collections.abc import Sequence
from pathlib import Path

from data.files import cannot_write, replace_file
from reports.page import render_page
from reports.parts import count
from reports.runs.outcome import outcome_of
from reports.runs.reading import read_runs
from reports.runs.results import results_section
from reports.runs.sections import curves_section, environment_section, settings_section, verdict_section


def write_run_report(path: Path, folders: Sequence[Path]) -> None:
    """Write the page.

    Args:
        path: of the HTML file; an earlier one is replaced.
        folders: of the runs, at least one.

    Raises:
        InputError: if a folder is no run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    outcomes = [outcome_of(run) for run in runs]
    page = render_page(
        {
            "Verdict": verdict_section(runs, outcomes),
            "Results": results_section(runs),
            "Curves": curves_section(runs, outcomes),
            "Settings": settings_section(runs),
            "Environment": environment_section(runs),
        },
        title=runs[0].name if len(runs) == 1 else f"{count(len(runs), 'run')} compared",
        subtitle=str(folders[0]) if len(runs) == 1 else ", ".join(run.name for run in runs),
        footer="Everything on this page comes from the run folders: metrics.jsonl, metrics.json, env.json, "
        "operative_config.gin, and progress.json of the newest checkpoint.",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page)
    except OSError as error:
        raise cannot_write(path, error) from error
