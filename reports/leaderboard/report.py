"""Writes a leaderboard as Markdown tables and as a page with plots, which needs no network and no other file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.files import cannot_write, replace_file
from reports.charts import Line, line_chart
from reports.leaderboard.tables import Board, Cell, Row, Table, introduction, other_tables, slice_tables
from reports.markup import Markup, element, join
from reports.page import render_page
from reports.parts import table

_GROUPED = {
    "popularity": ("by popularity of the target", "training interactions of the target; 0 is a cold item"),
    "history_length": ("by length of the history", "training interactions of the user"),
}
_CHARTED = ("recall@10", "ndcg@10")
_SPREAD = 0.5
"""Share of the place between two groups over which lines are shifted, so that their bars stand side by side."""


def write_leaderboard(folder: Path, name: str, rows: Sequence[dict[str, Any]], *, about: Row) -> list[Path]:
    """Write {name}.md and {name}.html.

    Args:
        folder: where to; created.
        name: of the files.
        rows: of the result.
        about: the result's envelope: device, commit, command, date.

    Returns:
        Paths of the files.

    Raises:
        InputError: if they cannot be written.
    """
    board = Board.of(rows)
    files = {folder / f"{name}.md": markdown(board, about), folder / f"{name}.html": page(board, about)}
    for path, text in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        except OSError as error:
            raise cannot_write(path, error) from error
    return list(files)


def markdown(board: Board, about: Row) -> str:
    """The tables with the sentences around them."""
    lines = [f"# Leaderboard: {board.head['settings']['dataset']}", "", *_paragraphs(introduction(board))]
    for found in (*slice_tables(board), *other_tables(board)):
        lines += [f"## {found.title}", "", *_paragraphs(found.notes), *_markdown_table(found)]
    return "\n".join([*lines, _footer(about), ""])


def page(board: Board, about: Row) -> str:
    """The page: metrics, plots, then comparisons and costs."""
    settings = board.head["settings"]
    return render_page(
        {
            "About": element("section", *map(_paragraph, introduction(board)), id="about"),
            "Results": element("section", *map(_table, slice_tables(board)), id="results"),
            "Plots": _plots(board),
            "Comparisons": element("section", *map(_table, other_tables(board)), id="comparisons"),
        },
        title=f"Leaderboard: {settings['dataset']}",
        subtitle=f"{settings['split']}, {about['device']}",
        footer=_footer(about),
    )


def _footer(about: Row) -> str:
    return (
        f"{about['command']}, commit {about['commit']}, {about['date']}, on {about['device']}. Every measured metric, "
        "interval and comparison follows from the saved ranks of every user: the same command with --recompute."
    )


def _paragraphs(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in (sentence, "")]


def _markdown_table(found: Table) -> list[str]:
    if not found.rows:
        return []
    rule = ["---:" if index in found.numbers else "---" for index in range(len(found.head))]
    body = [[_markdown_cell(cell) for cell in row] for row in found.rows]
    return [*(f"| {' | '.join(cells)} |" for cells in (found.head, rule, *body)), ""]


def _markdown_cell(cell: Cell) -> str:
    text = f"{cell.text} ({cell.note})" if cell.note else cell.text
    return text.replace("|", "\\|")


def _table(found: Table) -> Markup:
    rows = [[_first(row[0]), *map(_cell, row[1:])] for row in found.rows]
    content = element("div", table(found.head, rows, numbers=found.numbers), class_="scroll") if rows else Markup("")
    return join(element("h3", found.title), *map(_paragraph, found.notes), content)


def _first(cell: Cell) -> Markup:
    return join(element("strong", cell.text), *_note(cell))


def _cell(cell: Cell) -> Markup:
    return join(cell.text, *_note(cell))


def _note(cell: Cell) -> list[Markup]:
    return [element("small", cell.note)] if cell.note else []


def _paragraph(sentence: str) -> Markup:
    return element("p", sentence)


def _plots(board: Board) -> Markup:
    """Each metric against each grouping of the users, a line per row."""
    pairs = [
        element("div", *(_chart(board, metric, grouping, title, x_label) for metric in _CHARTED), class_="charts wide")
        for grouping, (title, x_label) in _GROUPED.items()
    ]
    note = "Upright bars are 95% intervals; the lines are shifted sideways so that bars do not hide each other."
    return element(
        "section",
        element("h2", "Plots"),
        element("p", note, class_="soft"),
        *pairs,
        id="plots",
    )


def _chart(board: Board, metric: str, grouping: str, title: str, x_label: str) -> Markup:
    names = [_group_name(group) for group in board.measured[0][grouping]]
    lines = [
        Line(
            row["implementation"],
            [place + _shift(index, len(board.measured)) for place in range(len(names))],
            [group[metric]["mean"] for group in row[grouping]],
            f"l{index % 8}{' dashes' if index >= 8 else ''}",
            [(group[metric]["low"], group[metric]["high"]) for group in row[grouping]],
        )
        for index, row in enumerate(board.measured)
    ]
    span = (-0.5, len(names) - 0.5)
    return line_chart(f"{metric} {title}", lines, x_label=x_label, x_span=span, x_names=names)


def _shift(index: int, num_lines: int) -> float:
    return _SPREAD * ((index + 0.5) / num_lines - 0.5)


def _group_name(group: Row) -> str:
    low, high = group["low"], group["high"]
    return f"{low:,}" if low == high else f"{low:,}\N{EN DASH}{high:,}"
