"""Small parts of reports: words, tables, gauges, key figures."""

from collections.abc import Sequence

from reports.markup import Markup, element

NOTHING = "\N{EN DASH}"


def percent(share: float) -> str:
    """97.3%."""
    return f"{share:.1%}"


def count(number: int, noun: str) -> str:
    """1 item, 1,234 items."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    bar: int | None = None,
    narrow: bool = False,
) -> Markup:
    """A table whose rows become blocks on a narrow screen, where every cell says what it is.

    Args:
        head: names of the columns; a bar and a mark need none.
        rows: cells; the first says what the row is about.
        numbers: columns that stand to the right.
        bar: column of a gauge.
        narrow: whether it need not be as wide as the page.
    """
    classes = ["number" if index in numbers else "bar" if index == bar else None for index in range(len(head))]
    names = [element("th", name, scope="col", class_=class_) for name, class_ in zip(head, classes, strict=True)]
    body = [
        element(
            "tr",
            *(
                element("td", cell, class_=class_, data_label=(name or None) if index else None)
                for index, (cell, class_, name) in enumerate(zip(row, classes, head, strict=True))
            ),
        )
        for row in rows
    ]
    return element(
        "table",
        element("thead", element("tr", *names)),
        element("tbody", *body),
        class_="narrow" if narrow else None,
    )


def gauge(share: float, mark: float | None = None) -> Markup:
    """A share as a bar, and a mark on it."""
    filled = element("div", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%")
    line = Markup("") if mark is None else element("i", style=f"left:{100 * mark:.1f}%")
    return element("div", filled, line, class_="gauge", aria_hidden="true")


def key_figures(figures: Sequence[tuple[str, str, str]]) -> Markup:
    """Name, value and note of the few numbers that come first."""
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", note)))
            for name, value, note in figures
        ),
        class_="figures",
    )
