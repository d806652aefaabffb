"""Pages of reports: one HTML file each, which needs no network and no other file."""

import re
from collections.abc import Mapping
from pathlib import Path

from reports.markup import Markup, element, join

_ROOM = Path(__file__).parent


def render_page(
    sections: Mapping[str, Markup],
    *,
    title: str,
    subtitle: str,
    footer: str,
    style: str = "",
    scripts: Markup | None = None,
) -> str:
    """A page in the style of all reports.

    Args:
        sections: by the name that leads to them; the id of one is its name in small letters.
        title: heads it.
        subtitle: beside the title.
        footer: last line.
        style: more CSS than `style.css`.
        scripts: data and scripts, at the end of the body.
    """
    parts = {
        "style": Markup(_read("style.css") + style),
        "title": join(title),
        "subtitle": join(subtitle),
        "nav": join(*(element("a", name, href=f"#{name.lower()}") for name in sections)),
        "sections": join(*sections.values()),
        "footer": join(footer),
        "scripts": scripts or Markup(""),
    }
    # In one pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return (_ROOM / name).read_text(encoding="utf-8")
