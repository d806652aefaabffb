"""Final metrics of runs, side by side."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from evaluation.metrics import HIGH, LOW, METRICS
from reports.markup import Markup, element, join
from reports.parts import NOTHING, count, table
from reports.plots import number
from reports.runs.reading import Run, on_same_data

_SLICES = tuple((split, part) for split in ("test", "valid") for part in ("all", "warm", "cold"))
_SHOWN = (("test", "all"), ("valid", "all"))
"""The others can be opened."""


class _Row(NamedTuple):
    """A ranker of some runs that agree in every number."""

    ranker: str
    runs: list[str]
    metrics: dict[str, Any]


def results_section(runs: Sequence[Run]) -> Markup:
    """Rankers against metrics where runs rank; other final metrics against runs."""
    parts = [element("h2", "Results")]
    if all(run.metrics is None for run in runs):
        parts.append(element("p", "No final metrics yet: they are written when training has ended."))
    for split, part in _SLICES:
        rows = _rows(runs, f"/{split}/{part}/")
        if rows and (split, part) in _SHOWN:
            parts += [element("h3", _heading(rows, split, part)), _ranking_table(rows, runs)]
        elif rows:
            content = element("div", _ranking_table(rows, runs), class_="inside")
            parts.append(element("details", element("summary", _heading(rows, split, part)), content))
    if any(name.endswith(LOW) for run in runs for name in run.metrics or {}):
        best = (
            "the best of a column is in bold" if on_same_data(runs) else "the runs are on different data, none is best"
        )
        note = f"Small numbers are 95% confidence intervals; {best}."
        parts.insert(1, element("p", note, class_="soft"))
    others = _other_metrics(runs)
    if others:
        parts.append(_other_table(runs, others))
    return element("section", *parts, id="results")


def _rows(runs: Sequence[Run], place: str) -> list[_Row]:
    """A row per run and ranker; runs that agree in every number of a ranker, as in baselines, share one."""
    rows: list[_Row] = []
    for run in runs:
        rankers: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in (run.metrics or {}).items():
            ranker, found, metric = key.partition(place)
            if found and number(value) is not None:
                rankers[ranker][metric] = value
        for ranker, metrics in rankers.items():
            same = [row for row in rows if row.ranker == ranker and row.metrics == metrics]
            if same:
                same[0].runs.append(run.name)
            else:
                rows.append(_Row(ranker, [run.name], metrics))
    return [row for row in rows if any(metric in row.metrics for metric in METRICS)]


def _heading(rows: Sequence[_Row], split: str, part: str) -> str:
    users = sorted({int(row.metrics["count"]) for row in rows if "count" in row.metrics})
    fewer = f"{users[0]:,} to " if len(users) > 1 else ""
    return f"{split}, {part}" + (f", {fewer}{count(users[-1], 'user')}" if users else "")


def _ranking_table(rows: Sequence[_Row], runs: Sequence[Run]) -> Markup:
    """The best is marked where all rows are about the same users."""
    metrics = [metric for metric in METRICS if any(metric in row.metrics for row in rows)]
    compared = len(rows) > 1 and on_same_data(runs) and len({row.metrics.get("count") for row in rows}) == 1
    best = {metric: max(row.metrics[metric] for row in rows if metric in row.metrics) for metric in metrics}
    body = [
        (_ranker(row, runs), *(_cell(row.metrics, metric, best[metric], compared) for metric in metrics))
        for row in rows
    ]
    return element("div", table(("ranker", *metrics), body, numbers=range(1, len(metrics) + 1)), class_="scroll")


def _ranker(row: _Row, runs: Sequence[Run]) -> Markup:
    """Its name and, among several runs, those that it belongs to."""
    if len(runs) == 1:
        return element("strong", row.ranker)
    finished = [run.name for run in runs if run.metrics is not None]
    whose = "all runs" if row.runs == finished and len(finished) > 1 else ", ".join(row.runs)
    return join(element("strong", row.ranker), element("small", whose))


def _cell(metrics: dict[str, Any], metric: str, best: float, compared: bool) -> Markup:
    value = metrics.get(metric)
    if value is None:
        return join(NOTHING)
    text = f"{value:.4f}"
    shown = element("strong", text, class_="best") if compared and value == best else join(text)
    bounds = [metrics.get(metric + bound) for bound in (LOW, HIGH)]
    if None in bounds:
        return shown
    return join(shown, element("small", f"{bounds[0]:.4f} to {bounds[1]:.4f}"))


def _other_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of final metrics that are no ranker's and not told elsewhere."""
    told = ("best_step", "steps", "seconds")
    names = dict.fromkeys(name for run in runs for name in run.metrics or {} if name.count("/") < 3)
    return [name for name in names if name not in told]


def _other_table(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    rows = [(element("strong", name), *(_number((run.metrics or {}).get(name)) for run in runs)) for name in names]
    head = ("metric", *(run.name if len(runs) > 1 else "value" for run in runs))
    return element("div", table(head, rows, numbers=range(1, len(head)), narrow=len(runs) == 1), class_="scroll")


def _number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, int | float) else NOTHING
