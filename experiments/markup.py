"""Pieces of an HTML page: escaped names, figures or a dash, tables, sections. All text is escaped here."""

from __future__ import annotations

import html
import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

DASH = "–"


def clean(text: str) -> str:
    """Text without control characters, lone surrogates and non-characters, which XML and UTF-8 do not hold.

    >>> clean("a\\x00b é 犬")
    'a�b é 犬'
    """
    bad = lambda c: unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff"
    return "".join("\N{REPLACEMENT CHARACTER}" if bad(c) else c for c in text)


def escape(value: Any) -> str:
    """Escaped, for text and for attributes in double quotes."""
    return html.escape(clean(str(value)))


def breakable(value: Any) -> str:
    """Escaped, with places where a long name may break."""
    return escape(value).replace("_", "_<wbr>")


def command(value: str) -> str:
    """A command that breaks between its arguments."""
    return "<code>" + " ".join(f'<span class="argument">{escape(a)}</span>' for a in value.split(" ")) + "</code>"


def plain(value: Any) -> str:
    """A value of a config, as one would write it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def share(value: float | None, digits: int = 2) -> str:
    """In percent; a dash for what is not known."""
    return f"{value:.{digits}%}" if is_number(value) else DASH


def number(value: float | None, how: str) -> str:
    """In the format `how`; a dash for what is not known."""
    return format(value, how) if is_number(value) else DASH


def is_number(value: Any) -> bool:
    """Whether a value can be shown as a figure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def section(title: str, lead: str, body: str) -> str:
    """A section of markup `body` beneath its title and a sentence or two of text."""
    lead = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    return f"<section>\n<h2>{breakable(title)}</h2>\n{lead}{body}\n</section>"


def tile(name: str, value: str, more: str, hue: str = "") -> str:
    """One figure in large type; `hue` names a colour of the page."""
    style = f' class="level" style="--hue:var(--{hue})"' if hue else ""
    return (
        f'<div{style}><dt>{breakable(name)}</dt><dd class="figure">{escape(value)}</dd>'
        + (f'<dd class="more">{escape(more)}</dd>' if more else "")
        + "</div>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table in a container of its own that scrolls; the first `texts` columns to the left, figures to the right."""
    kind = lambda i: ' class="text"' if i < texts else ""
    top = "".join(f'<th scope="col"{kind(i)}>{escape(h)}</th>' for i, h in enumerate(head))
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td{kind(i)}>{escape(v)}</td>" for i, v in enumerate(values, 1))
        body += f'<tr><th scope="row">{breakable(name)}</th>{cells}</tr>\n'
    longest = max((len(str(row[0])) for row in rows), default=0)
    table = f'<table style="--name:{longest}ch"><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
