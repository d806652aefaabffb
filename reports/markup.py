"""HTML by construction: whatever is not markup already becomes text."""

import html
import json
from typing import Any


class Markup(str):
    """Text that is HTML and is taken as it stands; any other str is escaped where `element` meets it."""


def element(tag: str, *children: str, **attributes: str | None) -> Markup:
    """One element.

    Args:
        tag: its name.
        children: Markup, or text to be escaped.
        attributes: `class_="a"` for class, `aria_label="b"` for aria-label; None leaves one out.
    """
    named = (
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{''.join(named)}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Markup and escaped text, one behind the other."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def json_script(element_id: str, content: Any) -> Markup:
    """Data for the page's own script; nothing in it can end the element or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return element("script", Markup(text.replace("<", "\\u003c")), type="application/json", id=element_id)
