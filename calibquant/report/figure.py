"""Matplotlib figures as SVG that a page can hold inline and colour by its own style sheet.

Colours are names of the style sheet's variables, so that one figure suits light and dark. Text stays
text, in the page's font. One unit of a figure is one CSS pixel.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("ink", "muted", "line", "shade", "float", "before", "after", "warn")
"""Variables of the style sheet that figures use; `s0` to `s7` are series of a comparison."""
SERIES = tuple(f"s{number}" for number in range(8))
CODES = {name: f"#0102{number:02x}" for number, name in enumerate((*COLOURS, *SERIES))}
"""What stands for each variable while matplotlib draws."""
FONT_PX = 11.0

_FONT = "DejaVu Sans"
"""Comes with matplotlib, which measures with it; the page then uses a font of its own."""
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are no formulas
    "font.family": _FONT,
    "font.size": FONT_PX,
    "axes.linewidth": 0.8,
    "axes.edgecolor": CODES["line"],
    "axes.labelcolor": CODES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": CODES["ink"],
    "xtick.color": CODES["line"],
    "ytick.color": CODES["line"],
    "xtick.labelcolor": CODES["muted"],
    "ytick.labelcolor": CODES["muted"],
    "xtick.labelsize": FONT_PX,
    "ytick.labelsize": FONT_PX,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": CODES["line"],
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "calibquant",  # an id follows from what it names, and so may stand in two figures
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "path.simplify": True,
}


@contextmanager
def canvas(
    width: float, height: float, left: float, bottom: float, right: float, top: float
) -> Iterator[tuple[Axes, list[str]]]:
    """Axes with margins, in pixels, to draw on; on the way out the list gets the finished SVG.

    Everything is drawn inside the scope, where the page's style holds.
    """
    svg: list[str] = []
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the measuring font lacks, and of odd numbers
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        place = left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height
        axes = figure.add_axes(place)
        axes.patch.set_visible(False)
        yield axes, svg
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg.append(compact(file.getvalue()))


def compact(svg: str) -> str:
    """An SVG file as an element of a page: its colours variables, its numbers short, nothing unused."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style type=\"text/css\">.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1)
    svg = re.sub(r"font(-size|-family)?: [^;\"<>]*; ", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|<path d="[^"]*" style="fill: none"/>', "", svg)
    for name, code in CODES.items():
        svg = svg.replace(code, f"var(--{name})")
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r' (d|x|y|points|transform)="[^"]*"', _short_numbers, svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    while (shorter := re.sub(r"<(g|defs)>\n*</\1>\n|<g/>\n", "", svg)) != svg:
        svg = shorter
    return svg


def _short_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]).replace("\n", "")
