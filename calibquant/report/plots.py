"""The plots of a report, each an SVG element as text: charts of a row per unit, and small panels.

What is not finite is left out of a plot. A chart's height grows with its rows, so that 150 layers stay
as readable as 10 blocks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from calibquant.report.figure import CODES, SERIES, canvas
from calibquant.report.run_data import SCORES, ActivationRow, RangeRow, Run, Score, UnitRow

WIDTH, ROW, LONG = 390.0, 17.0, 22
"""Pixels of a row chart, and the characters of a row's name."""
TALL = 40
"""A chart of more rows has its axis at the top, too."""
PANEL = (280.0, 130.0)
ROUND = [1.0, 2.0, 5.0, 10.0]
"""Steps between ticks."""
MOST_LEVELS = 32
"""A grid finer than this is not drawn line by line."""


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def rows_axes(axes: Axes, names: Sequence[str]) -> None:
    """A row per name, from the top down."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    short = [name if len(name) <= LONG else f"{name[: LONG - 2]}…" for name in names]
    axes.set_yticks(range(len(names)), short)
    axes.tick_params(axis="y", labelcolor=CODES["ink"], pad=4)
    axes.grid(axis="x")
    axes.tick_params(axis="x", top=len(names) > TALL, labeltop=len(names) > TALL)
    axes.spines["left"].set_visible(False)


def strokes(
    axes: Axes, ends: Iterable[tuple[float, float, float, float]], colour: str, **style: Any
) -> None:
    """Lines from ``(x, y)`` to ``(x, y)``, all of them in one path."""
    gaps = [(x, y) for a, b, c, d in ends for x, y in ((a, b), (c, d), (math.nan, math.nan))]
    if gaps:
        axes.plot(*zip(*gaps, strict=True), color=CODES[colour], solid_capstyle="butt", **style)


def row_chart(
    names: Sequence[str], aside: float = 16, row: float = ROW
) -> tuple[float, float, float, float, float, float]:
    """Width, height and margins (left, bottom, right, top) of a chart with these rows."""
    left = 14 + 6.6 * min(LONG, max((len(name) for name in names), default=1))
    top = 26 if len(names) > TALL else 8
    return WIDTH, row * max(1, len(names)) + 28 + top, left, 28, aside, top


def positive_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis around positive values, with a few round ticks."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.3)
    decades = math.log10(high / low) if high / low < math.inf else 300
    steps = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def accuracy_chart(scores: dict[str, Score]) -> str:
    """Bars of top-1 and, paler, of top-5, with their numbers beside them."""
    colours = {"float": "float", "range_only": "before", "quantized": "after"}
    bars = [
        (2.4 * group + place, value, colours[key], pale)
        for group, key in enumerate(key for key in SCORES if key in scores)
        for place, value, pale in ((0, scores[key].top1, 1.0), (1, scores[key].top5, 0.45))
        if math.isfinite(value)
    ]
    names = [SCORES[key] for key in SCORES if key in scores]
    width, _, left, bottom, _, top = row_chart(names)
    rows = 2.4 * len(names)
    with canvas(width, ROW * rows + bottom + top, left, bottom, 56, top) as (axes, svg):
        rows_axes(axes, names)
        axes.set_ylim(rows - 0.8, -0.6)
        axes.set_yticks([2.4 * group + 0.5 for group, _ in enumerate(names)], names)
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        for place, value, colour, pale in bars:
            strokes(axes, [(0, place, value, place)], colour, lw=0.8 * ROW, alpha=pale)
            axes.text(102, place, f"{value:.2f}", va="center")
    return svg[0]


def error_chart(units: Sequence[UnitRow]) -> str:
    """Each unit's error before (ring) and after (dot), and its change; empty if none is positive."""
    values = [value for unit in units for value in (unit.before, unit.after) if drawable(value)]
    if not values:
        return ""
    names = [unit.name for unit in units]
    with canvas(*row_chart(names, aside=54)) as (axes, svg):
        rows_axes(axes, names)
        positive_log_axis(axes, values)
        for row, unit in enumerate(units):
            if change := change_words(unit.before, unit.after):
                place = 1 + 52 / axes.bbox.width
                beside = axes.get_yaxis_transform()
                axes.text(place, row, change, ha="right", va="center", transform=beside)
        for colour, marker, reverted in (("after", "o", False), ("warn", "X", True)):
            chosen = [(row, unit) for row, unit in enumerate(units) if unit.reverted == reverted]
            both = [(row, u) for row, u in chosen if drawable(u.before) and drawable(u.after)]
            strokes(axes, [(u.before, row, u.after, row) for row, u in both], colour, lw=2)
            before = [(u.before, row) for row, u in chosen if drawable(u.before)]
            after = [(u.after, row) for row, u in chosen if drawable(u.after)]
            ring = {"mfc": "none", "mec": CODES["before"], "mew": 1.6, "ms": 7}
            dots(axes, before, "o", ring)
            dots(axes, after, marker, {"mfc": CODES[colour], "mec": "none", "ms": 6})
    return svg[0]


def change_words(before: float, after: float) -> str:
    """How much smaller an error is, in whole percent; empty where that is no number."""
    change = percent_change(before, after)
    return f"{round(change):+d} %" if math.isfinite(change) else ""


def percent_change(before: float, after: float) -> float:
    """By how much an error changed, in percent; NaN where that is no number."""
    return 100 * (after / before - 1) if before and math.isfinite(before) else math.nan


def drawable(value: float) -> bool:
    """Whether a value has a place on a logarithmic axis."""
    return math.isfinite(value) and value > 0


def dots(axes: Axes, points: Sequence[tuple[float, float]], marker: str, style: dict[str, Any]) -> None:
    """A marker at each ``(value, row)``."""
    if points:
        axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, **style)


def shares_chart(units: Sequence[UnitRow]) -> str:
    """Weights that learning moved and unconverged ones, in percent of each unit's weights."""
    kinds = [([100 * unit.moved for unit in units], "after", -0.17)]
    kinds.append(([100 * unit.unconverged for unit in units], "before", 0.17))
    return bar_rows([unit.name for unit in units], kinds, "{:g} %")


def bar_rows(
    names: Sequence[str], kinds: Sequence[tuple[Sequence[float], str, float]], pattern: str
) -> str:
    """Horizontal bars from zero, each kind ``(values, colour, shift in rows)``; empty without a number."""
    known = finite(value for values, _, _ in kinds for value in values)
    if not known:
        return ""
    row = ROW * max(1.0, 0.5 * len(kinds))
    with canvas(*row_chart(names, row=row)) as (axes, svg):
        rows_axes(axes, names)
        axes.set_xlim(0, 1.05 * max(known) if max(known) > 0 else 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
        axes.xaxis.set_major_formatter(lambda value, _: pattern.format(float(f"{value:.6g}")))
        for values, colour, shift in kinds:
            bars = [(row + shift, value) for row, value in enumerate(values) if math.isfinite(value)]
            strokes(axes, [(0, place, v, place) for place, v in bars], colour, lw=0.7 * row / len(kinds))
    return svg[0]


def loss_panel(unit: UnitRow, run: Run) -> str:
    """A unit's reconstruction loss (left axis) and rounding regulariser (right axis) over the steps."""
    points = [point for point in unit.trace if math.isfinite(sum(point))]
    if not points:
        return ""
    steps, losses, penalties = zip(*points, strict=True)
    count = run.distil_iters if unit.distilled else run.iters
    last = count if math.isfinite(count) and count > 1 else max(steps) + 1
    with canvas(*PANEL, 50, 20, 44, 6) as (axes, svg):
        right = axes.twinx()
        right.patch.set_visible(False)
        right.fill_between(steps, penalties, color=CODES["before"], alpha=0.22, lw=0)
        right.set_ylim(0, 1.08 * max(max(penalties), 1e-12))
        axes.set_zorder(right.get_zorder() + 1)
        axes.plot(steps, losses, color=CODES["after"], lw=1.6, marker="o" if len(steps) == 1 else "")
        axes.set_ylim(*around(losses))
        axes.set_xlim(0, last)
        if run.soft and not unit.distilled and math.isfinite(run.warm_up) and 0 < run.warm_up <= 1:
            axes.axvspan(0, run.warm_up * last, color=CODES["shade"], lw=0, zorder=0)
        for side, colour in ((axes, "after"), (right, "before")):
            side.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
            side.tick_params(axis="y", labelcolor=CODES[colour], pad=3)
            side.yaxis.set_major_formatter(lambda value, _: brief(value))
            side.spines["left"].set_visible(False)
        if not max(penalties) > 0:
            right.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: brief(value))
        axes.grid(axis="y")
    return svg[0]


def around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows values with a little air."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - air, high + air


def brief(value: float) -> str:
    """A number for an axis in few characters: 12k, 3.4M, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def activation_panel(activation: ActivationRow) -> str:
    """Share of values per bin on a logarithmic axis, under the quantizer's range and grid."""
    total = sum(activation.counts)
    ranges = [found for found in (activation.calibrated, activation.learned) if found]
    edges = finite((activation.low, activation.high, *(v for r in ranges for v in (r.low, r.high))))
    if not edges or not math.isfinite(activation.high - activation.low):
        return ""
    low, high = min(edges), max(edges)
    if not low < high:
        low, high = low - 1, high + 1
    with canvas(*PANEL, 54, 20, 10, 6) as (axes, svg):
        axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
        draw_histogram(axes, activation, total)
        if activation.learned:
            draw_grid(axes, activation.learned, activation)
        if activation.calibrated:
            lines = [(x, 0, x, 1) for x in (activation.calibrated.low, activation.calibrated.high)]
            strokes(axes, lines, "before", lw=1.4, ls=(0, (4, 2)), transform=axes.get_xaxis_transform())
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.xaxis.set_major_formatter(lambda value, _: brief(value))
        axes.spines["left"].set_visible(False)
    return svg[0]


def draw_histogram(axes: Axes, activation: ActivationRow, total: float) -> None:
    """Filled steps of each bin's share in percent of all values."""
    axes.set_yscale("log")
    elements = activation.elements if activation.elements > 0 else total
    shares = 100 * np.array(activation.counts) / max(elements, 1.0)
    if not total > 0 or not math.isfinite(total):
        axes.set_ylim(0.1, 100)
        shares = np.zeros(1)
    else:
        floor = shares[shares > 0].min()
        axes.set_ylim(floor / 3, max(shares.max() * 2, floor * 10))
    bottom = axes.get_ylim()[0]
    places = np.linspace(activation.low, activation.high, len(shares) + 1)
    axes.stairs(
        np.maximum(shares, bottom), places, baseline=bottom, fill=True, color=CODES["float"], alpha=0.75
    )
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(
        lambda share, _: f"{brief(share) if share >= 1e-3 else f'{share:.0e}'} %"
    )


def draw_grid(axes: Axes, found: RangeRow, activation: ActivationRow) -> None:
    """The range as a shade and its levels as lines, where they are few enough to be told apart."""
    axes.axvspan(found.low, found.high, color=CODES["after"], alpha=0.10, lw=0, zorder=0)
    count = 2**activation.bits if activation.bits else 0
    told_apart = activation.channels == 1 and 1 < count <= MOST_LEVELS
    levels = np.linspace(found.low, found.high, count if told_apart else 2).tolist()
    upright = axes.get_xaxis_transform()
    strokes(axes, [(x, 0, x, 1) for x in levels], "after", lw=0.9, alpha=0.8, transform=upright)


def series_chart(names: Sequence[str], series: Sequence[Sequence[float]], logarithmic: bool) -> str:
    """A dot per row and series, for at most as many series as there are colours; empty without any."""
    shown = series[: len(SERIES)]
    valid = drawable if logarithmic else math.isfinite
    values = [value for one in shown for value in one if valid(value)]
    if not values:
        return ""
    row = ROW * max(1.0, 0.3 * len(shown))
    with canvas(*row_chart(names, row=row)) as (axes, svg):
        rows_axes(axes, names)
        if logarithmic:
            positive_log_axis(axes, values)
        else:
            axes.set_xlim(0, 1.05 * max(max(values), 1e-12))
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        for number, one in enumerate(shown):
            shift = 0.6 * (number + 0.5) / len(shown) - 0.3  # so that equal values do not hide each other
            points = [(value, place + shift) for place, value in enumerate(one) if valid(value)]
            style = {"mfc": CODES[SERIES[number]], "mec": "none", "ms": 6}
            dots(axes, points, "os^DvPX*"[number], style)
    return svg[0]
