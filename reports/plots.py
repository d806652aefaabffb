"""Curves of a run, drawn from its metrics.jsonl alone.

report/loss.png            training loss and its parts (of each level, too), validation loss where there is one
report/learning_rate.png   learning rate and gradient norm
report/codebook.png        codebook use, entropy, collisions
report/metrics.png         all other validation metrics, without their confidence bounds
"""

import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.schemas import InputError

Curve = tuple[list[int], list[float]]

_LEVEL = re.compile(r"_level_\d+$")
_CONFIDENCE_BOUND = re.compile(r"_(low|high)$")
_LOOP_FACTS = ("train/examples_per_second", "train/skipped_steps", "train/overflow_steps")
_SLICE_SIZE = re.compile(r"/count$")
_TOO_LARGE = 1e300
"""From here on, differences of two numbers may overflow."""


def plot_run(metrics_log: Path, report: Path) -> list[Path]:
    """Draw the curves of a run; figures without data are left out.

    Args:
        metrics_log: the run's metrics.jsonl; a last line that a crash cut short is ignored.
        report: folder for the PNG files, created when missing.

    Returns:
        Paths of the figures written; none, and that is said, where matplotlib is not installed.

    Raises:
        InputError: if the log does not exist.
    """
    figures: dict[str, dict[str, Curve]] = defaultdict(dict)
    curves = read_curves(metrics_log)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return []
    for name, curve in curves.items():
        figures[_figure_of(name)][name] = curve
    report.mkdir(parents=True, exist_ok=True)
    return [_draw(figures[title], title, report / f"{title}.png") for title in sorted(figures)]


def read_curves(metrics_log: Path) -> dict[str, Curve]:
    """Steps and values of every quantity that is drawn, by its name in the log.

    Args:
        metrics_log: a run's metrics.jsonl; a last line that a crash cut short is ignored.

    Raises:
        InputError: if it does not exist or is no text.
    """
    found = curves_of(read_records(metrics_log))
    return {name: curve for name, curve in found.items() if name not in _LOOP_FACTS}


def read_records(metrics_log: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, without those that are not whole.

    Raises:
        InputError: if it does not exist or is no text.
    """
    if not metrics_log.is_file():
        raise InputError(f"{metrics_log} does not exist; give the metrics.jsonl of a run folder.")
    try:
        lines = metrics_log.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {metrics_log} ({error}). Give the metrics.jsonl of a run folder.") from error
    return [record for line in lines if (record := _record(line))]


def curves_of(records: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """Steps and values by name; confidence bounds and sizes of slices are no curves, and only a `number` is a value."""
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    for record in records:
        for name, value in record.items():
            is_bound = _CONFIDENCE_BOUND.search(name) or _SLICE_SIZE.search(name)
            if name not in ("step", "seconds") and not is_bound and number(value) is not None:
                steps, values = curves[name]
                steps.append(record["step"])
                values.append(value)
    return curves


def number(value: Any) -> float | None:
    """The value if it is a number that can be drawn: finite, and no flag; else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < _TOO_LARGE else None


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return {}
    return record if number(record["step"]) is not None else {}


def _figure_of(name: str) -> str:
    if name in ("train/learning_rate", "train/gradient_norm"):
        return "learning_rate"
    if name.startswith("codebook/"):
        return "codebook"
    if name.startswith("train/") or name.rsplit("/", 1)[-1] in ("loss", "reconstruction", "quantize"):
        return "loss"
    return "metrics"


def panels(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Curves by quantity: the slices of a metric, or the levels of a codebook, share a panel."""
    found: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name, curve in sorted(curves.items()):
        found[_LEVEL.sub("", name.rsplit("/", 1)[-1])][name] = curve
    return found


def _draw(curves: dict[str, Curve], title: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    quantities = panels(curves)
    columns = min(len(quantities), 3)
    rows = -(-len(quantities) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(title.replace("_", " "))
    for index, (quantity, named) in enumerate(quantities.items(), start=1):
        axes = figure.add_subplot(rows, columns, index, title=quantity, xlabel="step")
        for name, (steps, values) in named.items():
            axes.plot(steps, values, marker="." if len(steps) < 30 else None, label=name)
        axes.grid(alpha=0.3)
        if len(named) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
