"""The page that holds several runs against each other."""

import math
from html import escape

from calibquant.report import plots
from calibquant.report.figure import SERIES
from calibquant.report.markup import (
    MISSING,
    decimal,
    document,
    duration,
    figure,
    keys,
    missing,
    percent,
    table,
)
from calibquant.report.page import grid
from calibquant.report.run_data import Run


def compare_page(runs: list[Run]) -> str:
    """Results, unit errors and differing settings of several runs, as one HTML document."""
    parts = [heading, results, accuracies, unit_errors, differences]
    return document(f"{len(runs)} runs", [part(runs) for part in parts])


def heading(runs: list[Run]) -> str:
    return f"<header><h1>{len(runs)} runs compared</h1></header>\n"


def labels(runs: list[Run]) -> list[str]:
    return [f"run {number}" for number, _ in enumerate(runs, 1)]


def top1(run: Run, key: str) -> float:
    return run.scores[key].top1 if key in run.scores else math.nan


def results(runs: list[Run]) -> str:
    head = ["", "float", "ranges only", "quantized", "to float", "MB (float32)", "time", "memory, GiB"]
    head += ["reverted units", "calibration", "network", "run"]
    rows = []
    for label, run in zip(labels(runs), runs, strict=True):
        accuracies = [top1(run, key) for key in ("float", "range_only", "quantized")]
        sizes = [decimal(size, "{:,.2f}") for size in (run.checkpoint_mb, run.float32_mb)]
        row = [label, *(percent(value) for value in accuracies)]
        row += [decimal(accuracies[2] - accuracies[0], "{:+.2f}"), f"{sizes[0]} ({sizes[1]})"]
        row += [duration(sum(plots.finite(run.seconds.values())))]
        row += [decimal(run.memory["peak_memory_gib"], "{:.2f}")]
        row += [str(sum(unit.reverted for unit in run.units)), calibration(run), run.network, run.name]
        rows.append(row)
    return "<h2>Results</h2>\n" + table(head, rows)


def calibration(run: Run) -> str:
    """How many calibration images and the start of their hash."""
    count, digest = run.calibration.get("count"), run.calibration.get("sha256")
    return f"{count}, {str(digest)[:8]}" if isinstance(count, int) else MISSING


def accuracies(runs: list[Run]) -> str:
    kinds = [("float", "float", -0.25), ("range_only", "before", 0.0), ("quantized", "after", 0.25)]
    bars = [([top1(run, key) for run in runs], colour, shift) for key, colour, shift in kinds]
    legend = keys(
        ("dot", "float", "float"), ("dot", "before", "ranges only"), ("dot", "after", "quantized")
    )
    chart = figure("Top-1", "percent", plots.bar_rows, labels(runs), bars, "{:g} %")
    return f"<h2>Accuracy</h2>\n{legend}{grid([chart])}"


def unit_errors(runs: list[Run]) -> str:
    """Errors after reconstruction by unit name, a column of dots per run."""
    shown = runs[: len(SERIES)]
    names = list(dict.fromkeys(unit.name for run in shown for unit in run.units))
    if not names:
        return "<h2>Units</h2>\n" + missing("None of the runs has reconstructed units.")
    found = [{unit.name: unit for unit in run.units} for run in shown]
    after = [[units[name].after if name in units else math.nan for name in names] for units in found]
    gain = [
        [
            units[name].after / units[name].before if name in units and units[name].before else math.nan
            for name in names
        ]
        for units in found
    ]
    few = f"The first {len(shown)} runs are shown. " if len(shown) < len(runs) else ""
    entries = [("dot", colour, label) for colour, label in zip(SERIES, labels(shown), strict=False)]
    apart = measured_apart(shown)
    words = (
        f"Errors are not shown: what they are measured by differs between the runs ({', '.join(apart)})."
        if apart
        else "Errors compare: they are of one float network on the same images."
    )
    charts = [
        figure(
            "Error after / before",
            "the smaller, the more was gained",
            plots.series_chart,
            names,
            gain,
            False,
        ),
    ]
    if not apart:
        errors = figure("Error after reconstruction", "logarithmic", plots.series_chart, names, after, True)
        charts.insert(0, errors)
    return f"<h2>Units</h2>\n<p>{few}{escape(words)}</p>\n{keys(*entries)}{grid(charts)}"


MEASURE = (
    *("model.", "data.input_size", "data.test_resize", "data.mean", "data.std", "data.augment"),
    *("data.sharpness", "quant.equalize.", "quant.recon.compensate", "quant.recon.held_out"),
)
"""Beginnings of settings on which a unit's error depends also where its output stays as near to the float
network's: they scale channels, choose or change images, or give the classifier another target."""
OF_DRAWS = {"data.augment": "none", "data.sharpness": "[1, 1]"}
"""Images are changed at random, by the seed, unless these settings have these values."""


def measured_apart(runs: list[Run]) -> list[str]:
    """What differs between runs, so that their units' errors cannot be held against each other."""
    drawn = any(
        dict(run.settings).get(path, still) != still for run in runs for path, still in OF_DRAWS.items()
    )
    measure = (*MEASURE, "process.seed") if drawn else MEASURE
    paths = [path for path, values in differing(runs) if path.startswith(measure)]
    hashes = {str(run.calibration.get("sha256")) for run in runs}
    return [*(["the calibration images"] if len(hashes) > 1 else []), *paths]


def differences(runs: list[Run]) -> str:
    """Settings and versions that are not the same in all runs."""
    rows = [[path, *values] for path, values in differing(runs)]
    title = "<h2>What differs</h2>\n"
    if not rows:
        return title + f"<p>{escape('Config and versions are the same in all runs.')}</p>\n"
    return title + table(["", *labels(runs)], rows)


def differing(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings and versions that are not the same in all runs, with each run's value."""
    known = [dict(run.settings) | {f"version {k}": v for k, v in run.versions} for run in runs]
    paths = dict.fromkeys(path for settings in known for path in settings)
    found = [(path, [settings.get(path, MISSING) for settings in known]) for path in paths]
    return [(path, values) for path, values in found if len(set(values)) > 1]
