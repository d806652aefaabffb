"""The sections of a report on runs: runs in, markup out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reports.charts import Line, line_chart
from reports.markup import Markup, element, join
from reports.parts import NOTHING, count, key_figures, table
from reports.runs.outcome import BAD, GOOD, WARN, Outcome, duration
from reports.runs.reading import Run, Setting, on_same_data

_CURVES = {
    "train/loss": "training loss",
    "valid/loss": "validation loss",
    "train/gradient_norm": "gradient norm",
    "train/learning_rate": "learning rate",
    "train/examples_per_second": "examples per second",
}
"""Shown first, by their names in the log."""

_FAILED_STEPS = {"train/skipped_steps": "skipped steps", "train/overflow_steps": "overflowed steps"}
_PLACES = ("save_dir_root", "raw_dir", "DatasetConfig.root")
"""Settings that say where things lie."""


def verdict_section(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> Markup:
    """What a person has to know first."""
    worst = next(status for status in (BAD, WARN, GOOD) if any(outcome.status == status for outcome in outcomes))
    content = _one_verdict(outcomes[0]) if len(runs) == 1 else _many_verdicts(runs, outcomes)
    advice = [
        (run.name if len(runs) > 1 else "", line)
        for run, outcome in zip(runs, outcomes, strict=True)
        for line in outcome.advice
    ]
    to_do = element("ul", *(element("li", _named(name, line)) for name, line in advice), class_="change")
    return element("section", content, to_do if advice else Markup(""), id="verdict", class_=worst)


def _one_verdict(outcome: Outcome) -> Markup:
    steps = NOTHING if outcome.num_steps is None else f"of {outcome.num_steps:,}"
    headline = outcome.state.capitalize()
    if outcome.best_metric is not None:
        headline += f": {_metric_name(outcome)} {outcome.best_metric:.4g}"
    figures = [
        ("best", _value(outcome.best_metric), outcome.selection_metric or "not known which metric"),
        ("at step", _whole(outcome.best_step), "whose weights were kept"),
        ("steps", f"{outcome.step:,}", steps),
        ("training time", duration(outcome.seconds), "evaluations included"),
        ("skipped steps", f"{outcome.skipped:,}", "loss or gradient not finite"),
        ("overflowed steps", f"{outcome.overflowed:,}", "fp16 loss scaling"),
    ]
    return join(element("h2", headline), element("p", outcome.reason, class_="summary"), key_figures(figures))


def _many_verdicts(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> Markup:
    rows = [
        (
            _run_name(index, run.name),
            join(element("span", outcome.state, class_=f"mark {outcome.status}"), element("small", outcome.reason)),
            join(_value(outcome.best_metric), element("small", outcome.selection_metric or "")),
            _whole(outcome.best_step),
            f"{outcome.step:,}" + ("" if outcome.num_steps is None else f" of {outcome.num_steps:,}"),
            duration(outcome.seconds),
            f"{outcome.skipped:,} / {outcome.overflowed:,}",
        )
        for index, (run, outcome) in enumerate(zip(runs, outcomes, strict=True))
    ]
    head = ("run", "", "best", "at step", "steps", "time", "skipped / overflowed")
    return join(
        element("h2", _comparison(runs, outcomes)),
        element("div", table(head, rows, numbers=(2, 3, 4, 5, 6)), class_="scroll"),
    )


def _comparison(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    """Which run is ahead, where all were selected by one metric on the same data."""
    finished = f"{count(len(runs), 'run')}, {sum(run.metrics is not None for run in runs)} finished"
    if not on_same_data(runs):
        return f"{finished}, on different data"
    metrics = {(outcome.selection_metric, outcome.higher_is_better) for outcome in outcomes}
    name, higher = metrics.pop()
    if metrics or name is None or higher is None:
        return finished
    ranked = sorted(zip(outcomes, runs, strict=True), key=lambda pair: pair[0].best_metric or 0.0, reverse=higher)
    (first, winner), (second, _) = ranked[:2]
    if first.best_metric == second.best_metric:
        return f"{finished}: equal in {_metric_name(first)}"
    return f"{finished}: {winner.name} is ahead, {_metric_name(first)} {first.best_metric:.4g}"


def curves_section(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> Markup:
    """A chart per quantity, a line per run."""
    titles = {outcome.selection_metric: outcome.selection_metric for outcome in outcomes if outcome.selection_metric}
    titles |= {name: title for name, title in _CURVES.items() if name not in titles}
    titles |= {name: title for name, title in _FAILED_STEPS.items() if any(_happened(run, name) for run in runs)}
    first = [chart for name, title in titles.items() if (chart := _chart(runs, name, title))]
    names = dict.fromkeys(name for run in runs for name in run.curves)
    others = [_chart(runs, name, name) for name in names if name not in titles and name not in _FAILED_STEPS]
    if not first and not others:
        return element("section", element("h2", "Curves"), element("p", "Nothing was logged yet."), id="curves")
    more = element(
        "details",
        element("summary", f"All other curves ({len(others)})"),
        element("div", *others, class_="charts inside"),
    )
    return element(
        "section",
        element("h2", "Curves"),
        element("div", *first, class_="charts"),
        more if others else Markup(""),
        id="curves",
    )


def _chart(runs: Sequence[Run], name: str, title: str) -> Markup:
    lines = [Line(run.name, *run.curves[name], _style(index)) for index, run in enumerate(runs) if name in run.curves]
    return line_chart(title, lines, x_label="step") if lines else Markup("")


def _happened(run: Run, name: str) -> bool:
    return name in run.curves and any(run.curves[name][1])


def settings_section(runs: Sequence[Run]) -> Markup:
    """Where the runs were asked for different things, and all that each was asked for."""
    names = dict.fromkeys(name for run in runs for name in run.settings if not name.endswith(_PLACES))
    differing = [name for name in names if len({_setting(run, name).value for run in runs}) > 1]
    differing.sort(key=lambda name: any(name not in run.settings for run in runs))
    parts = [element("h2", "Settings")]
    if len(runs) > 1 and differing:
        rows = [(element("strong", name), *(_setting_cell(_setting(run, name)) for run in runs)) for name in differing]
        parts.append(element("div", table(("setting", *(run.name for run in runs)), rows), class_="scroll"))
    elif len(runs) > 1:
        parts.append(element("p", f"All {len(names)} settings are the same, but for where things lie."))
    parts.append(_changes(runs))
    for run in runs:
        summary = "All settings" if len(runs) == 1 else f"All settings of {run.name}"
        parts.append(element("details", element("summary", summary), _all_settings(run)))
    return element("section", *parts, id="settings")


def _changes(runs: Sequence[Run]) -> Markup:
    """What a run was told to change when it went on."""
    rows = [
        (
            element("strong", str(change.get("name"))),
            *(_text(change.get(key)) for key in ("before", "now", "started")),
            run.name,
        )
        for run in runs
        for change in run.changes
    ]
    if not rows:
        return Markup("")
    head = ("setting", "before", "afterwards", "when it went on", "run")
    return join(element("h3", "Changed during a run"), element("div", table(head, rows), class_="scroll"))


def _all_settings(run: Run) -> Markup:
    rows = [
        (join(name), setting.value, element("span", setting.origin, class_="soft"))
        for name, setting in run.settings.items()
    ]
    content = table(("setting", "value", "from"), rows) if rows else element("p", "Not known.")
    return element("div", content, class_="scroll inside")


def _setting(run: Run, name: str) -> Setting:
    return run.settings.get(name, Setting(NOTHING, ""))


def _setting_cell(setting: Setting) -> Markup:
    return join(setting.value, element("small", setting.origin))


def environment_section(runs: Sequence[Run]) -> Markup:
    """On what each ran, and from which state of the code."""
    facts = {name: [_text(fact(run.environment)) for run in runs] for name, fact in _FACTS.items()}
    versions = dict.fromkeys(name for run in runs for name in _inside(run.environment, "versions"))
    facts |= {name: [_text(_inside(run.environment, "versions").get(name)) for run in runs] for name in versions}
    rows = [(element("strong", name), *values) for name, values in facts.items() if set(values) != {NOTHING}]
    head = ("", *(run.name if len(runs) > 1 else "this run" for run in runs))
    return element(
        "section",
        element("h2", "Environment"),
        element("div", table(head, rows), class_="scroll") if rows else element("p", "env.json is missing or damaged."),
        id="environment",
    )


_FACTS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "started": lambda environment: environment.get("started"),
    "command": lambda environment: environment.get("command"),
    "commit": lambda environment: environment.get("commit"),
    "trial": lambda environment: environment.get("trial"),
    "seed": lambda environment: environment.get("seed"),
    "data": lambda environment: str(environment.get("data_manifest_hash") or "")[:12],
    "computed by": lambda environment: environment.get("ops"),
    "mixed precision": lambda environment: environment.get("mixed_precision"),
    "CUDA graphs": lambda environment: environment.get("cuda_graphs"),
    "GPUs": lambda environment: _inside(environment, "hardware").get("cuda_devices"),
    "processor": lambda environment: _inside(environment, "hardware").get("cpu"),
    "cores": lambda environment: _inside(environment, "hardware").get("cpu_count"),
    "threads": lambda environment: _inside(environment, "hardware").get("torch_threads"),
    "processes": lambda environment: _inside(environment, "hardware").get("num_processes"),
    "system": lambda environment: _inside(environment, "hardware").get("system"),
}


def _inside(environment: dict[str, Any], name: str) -> dict[str, Any]:
    found = environment.get(name)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return ("" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)) or NOTHING


def _run_name(index: int, name: str) -> Markup:
    return element("span", element("strong", name), class_=f"entry {_style(index)}")


def _style(index: int) -> str:
    """Colour of a run; beyond eight the colours return, with dashes."""
    return f"l{index % 8}" + (" dashes" if index >= 8 else "")


def _metric_name(outcome: Outcome) -> str:
    return outcome.selection_metric or "best value"


def _named(name: str, line: str) -> Markup:
    return join(element("span", f"{name}: ", class_="name"), line) if name else join(line)


def _value(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _whole(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"
