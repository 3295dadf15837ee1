"""Small pieces of HTML that both pages are made of. All text that goes in is escaped here."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from calibquant.errors import printable

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A page needs nothing from anywhere and runs no script; the browser holds it to that."""
MISSING = "-"


def document(title: str, body: Iterable[str]) -> str:
    """A whole page with its style inside."""
    style = files("calibquant.report").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{"".join(body)}</main>
</body>
</html>
"""


def decimal(value: float, pattern: str = "{:.4g}", suffix: str = "") -> str:
    """A number as text, or a dash for one that is not known."""
    return MISSING if math.isnan(value) else pattern.format(value) + suffix


def percent(value: float) -> str:
    return decimal(value, "{:.2f}", " %")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: ``3 h 20 min``, ``21 min 5 s``, ``4.2 s``."""
    if not math.isfinite(seconds) or seconds < 60:
        return decimal(seconds, "{:.1f}", " s")
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def tile(label: str, value: str, aside: str = "", main: bool = False) -> str:
    """A figure that stands out, with a line below."""
    kind = "tile main" if main else "tile"
    words = f"<span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(aside)}</small>"
    return f'<div class="{kind}">{words}</div>\n'


def keys(*entries: tuple[str, str, str]) -> str:
    """A legend of ``(shape, colour variable, words)``."""
    marks = "".join(_key(*entry) for entry in entries)
    return f'<div class="keys">{marks}</div>\n'


def _key(shape: str, colour: str, words: str) -> str:
    look = f"color: var(--{colour})" if shape == "rule" else f"background: var(--{colour})"
    style = "" if shape in ("ring", "dashes") else f' style="{look}"'
    return f'<span><i class="{shape}"{style}></i>{escape(words)}</span>'


def figure(caption: str, aside: str, draw: Callable[..., str], *arguments: Any, legend: str = "") -> str:
    """A plot under its caption; one that cannot be drawn says so and spoils nothing else.

    Args:
        legend: from :func:`keys`.
    """
    try:
        drawn = draw(*arguments) or f'<p class="missing">{escape(caption)}: no number to show</p>\n'
    except Exception as error:  # odd numbers may make matplotlib raise anything
        reason = escape(printable(f"{type(error).__name__}: {error}", 200))
        drawn = f'<p class="missing">not drawn: {reason}</p>\n'
    words = f"<b>{escape(caption)}</b> <small>{escape(aside)}</small>"
    return f"<figure><figcaption>{words}</figcaption>\n{legend}{drawn}</figure>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """A table that scrolls by itself where it is too wide; ``words`` wraps its cells instead."""
    kind = ' class="words"' if words else ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    titles = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    return f'<div class="scroll"><table{kind}>{titles}<tbody>\n{body}</tbody></table></div>\n'


def folded(summary: str, content: str, open: bool = False) -> str:
    """Content behind a line that opens it."""
    return f"<details{' open' if open else ''}><summary>{escape(summary)}</summary>\n{content}</details>\n"


def missing(words: str) -> str:
    return f'<p class="missing">{escape(words)}</p>\n'
