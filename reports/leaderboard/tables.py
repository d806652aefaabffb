"""The tables of a leaderboard as plain cells, for Markdown and for the page alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reports.parts import NOTHING, count

Row = Mapping[str, Any]

SLICES = {
    "all": "All test users",
    "warm": "Warm: users whose target occurs in training",
    "cold": "Cold: users whose target does not occur in training",
}
_METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20")
_DECISIVE = "ndcg@10"
"""Rows stand in the order of it."""

_SIGNIFICANCE = (
    "Intervals are 95% of the paired bootstrap over users, p is of the paired randomisation test with 10,000 random "
    "signs per user, which can say no less than 0.0001. Where only a handful of users differ the interval is too "
    "narrow: go by p there. Neither allows for the number of comparisons, nor for how another training would come out."
)


class Cell(NamedTuple):
    """A value, and what stands small beside it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its heading.

    Attributes:
        title: heading.
        head: names of the columns.
        rows: cells, one per column; none where there is nothing to show.
        notes: sentences below the heading.
        numbers: columns that stand to the right.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    notes: Sequence[str] = ()
    numbers: Sequence[int] = field(default=())


@dataclass(frozen=True)
class Board:
    """The rows of a result by what they are.

    Attributes:
        head: settings, users of each slice, best baseline.
        measured: rankers of this board.
        differences: within models.
        published: from papers.
    """

    head: Row
    measured: Sequence[Row]
    differences: Sequence[Row]
    published: Sequence[Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Board":
        """Sort the rows of a result, of which one is the board's head."""
        kinds = {case: [row for row in rows if row["case"] == case] for case in ("measured", "difference", "published")}
        head = next(row for row in rows if row["case"] == "board")
        return cls(head, kinds["measured"], kinds["difference"], kinds["published"])


def slice_tables(board: Board) -> list[Table]:
    """Metrics of all rows on each slice."""
    return [_slice_table(board, name) for name in SLICES]


def other_tables(board: Board) -> list[Table]:
    """Comparisons, what each row cost and ran on, and where published numbers come from."""
    found = [_against_baseline(board)]
    if board.differences:
        found.append(_within_models(board))
    found.append(_runs(board))
    if board.published:
        found.append(_sources(board))
    return found


def introduction(board: Board) -> list[str]:
    """What the numbers are, in sentences."""
    settings = board.head["settings"]
    seeds = settings["seeds"]
    sentences = [
        f"{settings['protocol']}. Every test user has one target, ranked among all items; a hit is that item.",
        "Small numbers are 95% intervals over users (Wilson's, as in evaluate.py), of gains averaged over the seeds"
        + (f"; ± is the standard deviation over the seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else "."),
    ]
    if board.published:
        sentences.append(
            "Rows marked “published” come from papers and other reports and were not measured here, often under "
            "another protocol; see their sources."
        )
    if settings["failed"]:
        sentences.append(f"Runs that failed and are missing here: {'; '.join(settings['failed'])}.")
    if settings["quick"]:
        sentences.insert(0, "A quick run of a few steps each: it shows that everything works together, not how well.")
    return sentences


def _slice_table(board: Board, name: str) -> Table:
    users = board.head["users"][name]
    title = f"{SLICES[name]} ({count(users, 'user')})"
    published = [row for row in board.published if name in row["slices"]]
    if users == 0:
        return Table(
            title, notes=["Empty: this data set and split has no such target, so there is nothing to measure."]
        )
    measured = sorted(board.measured, key=lambda row: -row["slices"][name][_DECISIVE]["mean"])
    rows = [[Cell(row["implementation"]), *_measured_cells(row["slices"][name])] for row in measured]
    rows += [[Cell(row["implementation"], "published"), *_published_cells(row["slices"][name])] for row in published]
    return Table(title, ("model", *_METRICS), rows, numbers=range(1, len(_METRICS) + 1))


def _measured_cells(metrics: Row) -> list[Cell]:
    cells = []
    for metric in _METRICS:
        value = metrics[metric]
        spread = "" if value["std"] is None else f" ± {value['std']:.4f}"
        cells.append(Cell(f"{value['mean']:.4f}{spread}", _interval(value)))
    return cells


def _published_cells(metrics: Row) -> list[Cell]:
    return [Cell(f"{metrics[metric]:.4f}" if metric in metrics else NOTHING) for metric in _METRICS]


def _against_baseline(board: Board) -> Table:
    best = board.head["best_baseline"]
    title = "Against the best baseline"
    if best is None:
        return Table(title, notes=["The board has neither a counted nor a sequence model to compare with."])
    rows = [
        [
            Cell(row["implementation"]),
            Cell(metric),
            *(_difference(row["against_best_baseline"][part][metric]) for part in SLICES),
        ]
        for row in board.measured
        if row["against_best_baseline"] is not None
        for metric in row["against_best_baseline"]["all"]
    ]
    notes = [
        f"The best counted or sequence model by validation NDCG@10 is {best}. Differences are the row minus {best}, "
        "paired user by user.",
        _SIGNIFICANCE,
    ]
    return Table(title, ("model", "metric", *SLICES), rows, notes, numbers=(2, 3, 4))


def _within_models(board: Board) -> Table:
    rows = [
        [
            Cell(f"{row['implementation']} minus {row['minus']}"),
            Cell(row["slice"]),
            Cell(row["metric"]),
            _difference(row),
        ]
        for row in board.differences
    ]
    head = ("rows", "users", "metric", "difference")
    return Table("Hybrid against generative", head, rows, [_SIGNIFICANCE], numbers=(3,))


def _difference(value: Row) -> Cell:
    if value["count"] == 0:
        return Cell("no users")
    text = f"{value['mean']:+.4f}"
    if value["low"] == value["high"] == 0:
        return Cell(text, "no user differs")
    verdict = "excludes zero" if value["excludes_zero"] else "includes zero"
    return Cell(text, f"{_interval(value)}, {verdict}, p {value['p_value']:.2g}")


def _runs(board: Board) -> Table:
    head = (
        "model",
        "parameters",
        "training minutes",
        "tokenizer minutes",
        "evaluation minutes",
        "budget, minutes",
        "hardware",
        "commit",
        "config",
    )
    rows = [[Cell(row["implementation"]), *_run_cells(row["run"])] for row in board.measured]
    notes = [
        "Parameters are the trainable ones. Training minutes include validation during training; evaluation minutes "
        "are those of all of a run's rankers, and the baselines beside them, on validation and test users; one number "
        "per seed. The budget is for the training minutes; a tokenizer comes on top of it, trained once and shared by "
        "seeds and models whose configs name the same one."
    ]
    return Table("Runs", head, rows, notes, numbers=range(1, 6))


def _run_cells(run: Row) -> list[Cell]:
    return [
        Cell(f"{run['parameters']:,}", run["stores"] and f"stores {run['stores']}"),
        Cell(_minutes(run["training_minutes"])),
        Cell(_minutes([run["tokenizer_minutes"]])),
        Cell(_minutes(run["evaluation_minutes"])),
        Cell(_minutes([run["budget_minutes"]])),
        Cell(run["hardware"], _threads(run["threads"])),
        Cell(", ".join(run["commits"])),
        Cell(run["config"], f"{'seeds' if len(run['seeds']) > 1 else 'seed'} {', '.join(map(str, run['seeds']))}"),
    ]


def _sources(board: Board) -> Table:
    rows = [
        [Cell(row["implementation"], "published"), Cell(row["source"]), Cell(row["protocol"])]
        for row in board.published
    ]
    return Table("Sources of published rows", ("model", "source", "what was measured"), rows)


def _minutes(values: Sequence[float | None]) -> str:
    return ", ".join(f"{value:.1f}" for value in values if value is not None) or NOTHING


def _threads(numbers: Sequence[int]) -> str:
    """Of all seeds, as one number where they agree."""
    different = sorted(set(numbers))
    return count(different[0], "thread") if len(different) == 1 else f"{' or '.join(map(str, different))} threads"


def _interval(value: Row) -> str:
    return f"{value['low']:.4f} to {value['high']:.4f}"
