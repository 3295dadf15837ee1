"""The page of one run, from top to bottom."""

import math
from html import escape

from calibquant.report import plots
from calibquant.report.markup import (
    decimal,
    document,
    duration,
    figure,
    folded,
    keys,
    missing,
    percent,
    table,
    tile,
)
from calibquant.report.run_data import SCORES, ActivationRow, Run, UnitRow

MANY = 60
"""More panels than this stay folded until they are asked for."""


def run_page(run: Run) -> str:
    """The report of a run as one HTML document that needs nothing else."""
    parts = [heading, tiles, notes, results, units, losses, activations, calibration_set, settings]
    return document(f"{run.network} {run.name}", [part(run) for part in parts])


def heading(run: Run) -> str:
    known = dict(run.settings)
    bits = (known.get(f"quant.{part}.bit", "?") for part in ("w_qconfig", "a_qconfig"))
    words = "{} bit weights, {} bit activations".format(*bits)
    about = f"Run {escape(run.name)}: {escape(words)}<br><code>{escape(run.command)}</code>"
    return f'<header><h1>{escape(run.network)}</h1>\n<p class="quiet">{about}</p></header>\n'


def tiles(run: Run) -> str:
    """The handful of numbers that a run is judged by."""
    shown = []
    whole = run.scores.get("float")
    for key in ("quantized", "range_only", "float"):
        score = run.scores.get(key)
        if score is not None:
            lost = math.nan if whole is None or key == "float" else score.top1 - whole.top1
            aside = f"{decimal(lost, '{:+.2f}')} points to float" if math.isfinite(lost) else ""
            images = decimal(score.images, "{:,.0f}", " images")
            label = f"Top-1, {SCORES[key]}"
            shown.append(tile(label, percent(score.top1), aside or images, main=key == "quantized"))
    if math.isfinite(run.checkpoint_mb):
        aside = f"float32: {decimal(run.float32_mb, '{:,.2f}', ' MB')}"
        if run.checkpoint_mb > 0 and math.isfinite(run.float32_mb):
            aside += f", {run.float32_mb / run.checkpoint_mb:.1f} times more"
        shown.append(tile("Size on disk", decimal(run.checkpoint_mb, "{:,.2f}", " MB"), aside))
    spent = plots.finite(run.seconds.values())
    if spent:
        aside = f"reconstruction: {duration(run.seconds.get('reconstruct', math.nan))}"
        shown.append(tile("Time", duration(sum(spent)), aside))
    host, peak = run.memory["peak_host_memory_gib"], run.memory["peak_memory_gib"]
    if math.isfinite(peak):
        aside = "of the process" if peak == host else f"GPU; host {decimal(host, '{:.1f}', ' GiB')}"
        shown.append(tile("Peak memory", f"{peak:.2f} GiB", aside))
    return f'<div class="tiles">\n{"".join(shown)}</div>\n'


def notes(run: Run) -> str:
    """What a reader must know before believing the rest; nothing where all is well."""
    found = []
    if "quantized" not in run.scores:
        found.append("This run did not finish, or its result was not scored.")
    reverted = [unit.name for unit in run.units if unit.reverted]
    if reverted:
        words = ", ".join(reverted)
        found.append(f"Learning made these units no better, kept as before learning: {words}.")
    strange = [unit.name for unit in run.units if not math.isfinite(unit.after)]
    if strange:
        found.append(f"The error of these units is no finite number: {', '.join(strange)}.")
    together, stage = (
        sum(plots.finite(u.seconds for u in run.units)),
        run.seconds.get("reconstruct", math.nan),
    )
    if together > 1.05 * stage + 1:
        found.append(
            f"The run was continued: its units took {duration(together)} together, the last start "
            f"{duration(stage)}. The memory of units finished before is that of running them again."
        )
    if run.damage:
        found.append(f"Activations and pictures are missing: {run.damage}.")
    skipped = run.calibration.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        found.append(f"Unreadable calibration images that were skipped: {skipped:,}.")
    unread = max((s.skipped for s in run.scores.values() if s.skipped > 0), default=0)
    if unread:
        found.append(f"Unreadable validation images that were skipped: {unread:,.0f}.")
    items = "".join(f"<li>{escape(words)}</li>\n" for words in found)
    return f'<ul class="notes">\n{items}</ul>\n' if items else ""


def results(run: Run) -> str:
    head = ["", "top-1", "top-5", "images"]
    rows = [
        [SCORES[key], percent(s.top1), percent(s.top5), decimal(s.images, "{:,.0f}")]
        for key, s in run.scores.items()
    ]
    files = [([run.float32_mb, run.checkpoint_mb], "after", 0.0)]
    accuracy = figure("Accuracy", "percent; pale: top-5", plots.accuracy_chart, run.scores)
    size = figure("Size on disk", "MB", plots.bar_rows, ["float32", "saved file"], files, "{:g}")
    place = f'<p class="quiet">Saved as <code>{escape(run.checkpoint)}</code></p>\n'
    aside = f"<div>{size}{place if run.checkpoint else ''}{table(head, rows)}</div>\n"
    return "<h2>Accuracy and size</h2>\n" + grid([accuracy, aside])


def grid(charts: list[str]) -> str:
    return f'<div class="charts">\n{"".join(charts)}</div>\n'


def units(run: Run) -> str:
    """Charts of a row per unit, and the same as a table."""
    if not run.units:
        return "<h2>Units</h2>\n" + missing("No unit was reconstructed.")
    names, rows = [unit.name for unit in run.units], run.units
    seconds = [([unit.seconds for unit in rows], "after", 0.0)]
    memory = [([unit.memory for unit in rows], "after", 0.0)]
    errors = [("ring", "before", "ranges only, nearest rounding"), ("dot", "after", "reconstructed")]
    if any(unit.reverted for unit in rows):
        errors.append(("dot", "warn", "reverted, kept as before learning"))
    shares = keys(("dot", "after", "moved by learning"), ("dot", "before", "unconverged"))
    charts = [
        figure("Error before and after", "logarithmic", plots.error_chart, rows, legend=keys(*errors)),
        figure(
            "Rounding of weights", "percent of a unit's weights", plots.shares_chart, rows, legend=shares
        ),
        figure("Time", "seconds", plots.bar_rows, names, seconds, "{:g}"),
        figure("Peak memory so far", "GiB, when the unit was done", plots.bar_rows, names, memory, "{:g}"),
    ]
    together = [unit.name for unit in rows if unit.distilled]
    began = "that compensation chose" if run.compensated else "nearest to it"
    words = (
        "In the order of reconstruction. A unit's error is the squared difference of its output to the "
        "float network's on the calibration images that it learned from, summed over channels and averaged "
        "over the rest. "
        + ("The classifier's is to that of one fitted to its inputs. " if run.compensated else "")
        + (
            f"Of {', '.join(together)} it is the divergence of the network's predictions from the float "
            "network's, by which these units learned on together. "
            if together
            else ""
        )
        + f"Moved: learning left the weight at another grid point than the one {began}. "
        "Unconverged: the rounding was not decided by the last step, and settled afterwards."
    )
    numbers = folded("The same in numbers", unit_table(rows))
    return f"<h2>Units</h2>\n<p>{escape(words)}</p>\n{grid(charts)}{numbers}"


def change(before: float, after: float) -> str:
    """By how much an error changed, in percent."""
    return decimal(plots.percent_change(before, after), "{:+.1f}", " %")


def unit_table(units: list[UnitRow]) -> str:
    held_out = any(math.isfinite(unit.held_out_after) for unit in units)
    head = [
        "unit",
        "error before",
        "after",
        "change",
        *(["change, held out"] if held_out else []),
        "moved",
        "unconverged",
        "seconds",
        "memory, GiB",
        "",
    ]
    rows = [
        [
            unit.name,
            decimal(unit.before),
            decimal(unit.after),
            change(unit.before, unit.after),
            *([change(unit.held_out_before, unit.held_out_after)] if held_out else []),
            percent(100 * unit.moved),
            percent(100 * unit.unconverged),
            decimal(unit.seconds, "{:.1f}"),
            decimal(unit.memory, "{:.2f}"),
            "reverted" if unit.reverted else "",
        ]
        for unit in units
    ]
    return table(head, rows)


def losses(run: Run) -> str:
    curves = [unit for unit in run.units if unit.trace]
    title = "<h2>Loss curves</h2>\n"
    if not curves:
        return title + missing("No step was made, so there are no curves.")
    entries = [("rule", "after", "reconstruction loss of a batch (left axis)")]
    if run.soft:
        exponent = " to ".join(f"{value:g}" for value in run.b_range)
        entries.append(("dot", "before", f"rounding regulariser, exponent b from {exponent} (right axis)"))
        entries.append(("box", "shade", "warm-up: the regulariser does not act"))
    legend = keys(*entries)
    panels = "".join(figure(unit.name, loss_words(unit), plots.loss_panel, unit, run) for unit in curves)
    return title + legend + panel_grid(panels, len(curves), "curves")


def loss_words(unit: UnitRow) -> str:
    """What stands beside a curve's name."""
    change = plots.change_words(unit.before, unit.after)
    words = f"error {change}" if change else ""
    return f"{words}, reverted" if unit.reverted else words


def panel_grid(panels: str, count: int, what: str) -> str:
    return folded(f"{count} {what}", f'<div class="panels">\n{panels}</div>\n', open=count <= MANY)


def activations(run: Run) -> str:
    title = "<h2>Activations</h2>\n"
    if not run.activations:
        return title + missing("This run recorded no activations: its report.json is missing or has none.")
    legend = keys(
        ("dot", "float", "share of values in a bin, logarithmic; zeros left out"),
        ("dashes", "before", "range as calibrated"),
        ("rule", "after", f"range and levels at the end (levels: up to {plots.MOST_LEVELS})"),
    )
    words = (
        f"<p>What {decimal(run.histogram_images, '{:.0f}')} calibration images give each activation "
        "quantizer, in full precision. Clipped: values beyond the range at the end.</p>\n"
    )
    panels = "".join(
        figure(entry.name, activation_words(entry), plots.activation_panel, entry)
        for entry in run.activations
    )
    return title + words + legend + panel_grid(panels, len(run.activations), "activations")


def activation_words(activation: ActivationRow) -> str:
    """Bits, zeros and clipped share of an activation."""
    last = activation.learned or activation.calibrated
    words = [f"{activation.bits} bit"]
    if activation.elements > 0:
        words.append(f"{100 * activation.zeros / activation.elements:.0f} % zeros")
    if last is not None and math.isfinite(last.clipped):
        words.append(f"{100 * last.clipped:.2g} % clipped{'' if activation.learned else ' as calibrated'}")
    if activation.channels > 1:
        words.append(f"{activation.channels} channels, widest range")
    return ", ".join(words)


def calibration_set(run: Run) -> str:
    title = "<h2>Calibration set</h2>\n"
    count, digest = run.calibration.get("count"), run.calibration.get("sha256")
    total = f"{count:,}" if isinstance(count, int) else "?"
    words = f"<p>{total} images, sha256 <code>{escape(str(digest)[:80])}</code>.</p>\n"
    if not run.thumbnails:
        return title + words + missing("This run kept no pictures of them.")
    shown = f"<p>{len(run.thumbnails):,} of {total} are shown, as the network is given them.</p>\n"
    pictures = "".join(
        f'<img src="data:image/jpeg;base64,{jpeg}" alt="{escape(name)}" title="{escape(name)}">\n'
        for name, jpeg in run.thumbnails
    )
    return title + words + shown + f'<div class="thumbs">\n{pictures}</div>\n'


def settings(run: Run) -> str:
    stages = [(name, duration(seconds)) for name, seconds in run.seconds.items()]
    return (
        '<h2>Settings and versions</h2>\n<div class="charts">\n'
        f"<div><h3>Config</h3>\n{table([], run.settings, words=True)}</div>\n"
        f"<div><h3>Versions</h3>\n{table([], run.versions, words=True)}"
        f"<h3>Time per stage</h3>\n{table([], stages, words=True)}</div>\n</div>\n"
    )
