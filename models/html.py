"""HTML as Horace's pages are made of it: elements that escape their text, and the document.

Rules:
    Text becomes HTML in `tag` and `join` alone, which escape whatever is not `Html` already: a
    file name or a label is never markup.
    A page is one file: no script, style, font or picture comes from anywhere else.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"img", "input", "meta", "br"})
"""Elements without content."""


class Html(str):
    """Text that is markup already, and so is not escaped again."""


def tag(element: str, /, *children: str, **attributes: str) -> Html:
    """Make an element.

    Args:
        element: its name.
        children: text, which is escaped, or `Html`, which is not.
        attributes: their values are escaped; `class_` stands for class, and
            `aria_label` for aria-label.
    """
    texts = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    ]
    opening = f"<{element}{''.join(texts)}>"
    if element in VOID:
        return Html(opening)
    return Html(f"{opening}{join(children)}</{element}>")


def join(texts: Iterable[str]) -> Html:
    """Set texts, escaped, and elements one after the other."""
    return Html("".join(x if isinstance(x, Html) else html.escape(x) for x in texts))


def document(title: str, *children: str, style: str, script_hash: str | None = None) -> str:
    """Make a whole document, which may load nothing.

    Args:
        title: the window's.
        children: the body.
        style: of this document alone.
        script_hash: of the one script that may run, as `sha256-...`; none may where None.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script_hash is not None:
        policy += f"; script-src '{script_hash}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *children), lang='en')}\n"
