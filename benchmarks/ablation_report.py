"""What an ablation's runs say together: comparisons, sets against their scores, tables, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.ablation_plan import Point
from benchmarks.ablation_runs import METRICS, STAGES, Outcome, Result
from benchmarks.ablation_statistics import (
    Difference,
    own_spread,
    paired_difference,
    pooled,
    rank_correlation,
    spread,
)
from calibquant.errors import UserError
from calibquant.report.plots import finite
from calibquant.solver.files import PICTURES, write_picture

TITLES = {
    "top1": "top-1 %",
    "agreement": "agreement %",
    "kl": "KL",
    "expected_drop": "expected drop of top-1",
}
DIGITS = {"top1": 2, "agreement": 2, "kl": 4, "expected_drop": 3}
LEVEL_LETTERS = 14
"""Of a variant's name in the plot: longer ones would run into one another, and are slanted."""
PANELS = {
    "top1": "top-1 below float, points",
    "expected_drop": "expected drop, points",
    "kl": "KL(float || quantized), nats",
}
"""What the plot shows of each set, side by side."""

Finished = Sequence[tuple[Point, Result]]
Scores = Mapping[str, Mapping[str, float]]
"""By set, what each label-free score says of it; lower is better."""


@dataclass(frozen=True)
class Comparison:
    """A variant's means over runs and images, and how far they are from the baseline's, of the same images.

    Attributes:
        runs: of how many sets and seeds; each image's value is the mean over those that scored it.
        differences: by metric; empty for the baseline itself.
    """

    bits: str
    variant: str
    runs: int
    means: dict[str, float]
    range_only: dict[str, float]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class SetEffect:
    """What the calibration set changes of a variant, on the images that all of its runs scored.

    Attributes:
        images: how many these are.
        float_top1: of the float network on them, in percent.
        means: by set and metric, the mean over seeds and images; by seed, each of which draws other images,
            where there is but one set.
        spreads: by metric, the largest of these minus the smallest.
        own_spreads: by metric, what of that endlessly many images would leave; see :func:`own_spread`.
        correlations: by score and metric, Spearman's rank correlation over the sets.
    """

    bits: str
    variant: str
    images: int
    float_top1: float
    means: dict[str, dict[str, float]]
    spreads: dict[str, float]
    own_spreads: dict[str, Difference]
    correlations: dict[str, dict[str, float]]


def groups(finished: Finished) -> dict[tuple[str, str], list[tuple[Point, Result]]]:
    """Runs by bits and variant, in the order in which these first stand."""
    found: dict[tuple[str, str], list[tuple[Point, Result]]] = {}
    order = {bits: place for place, bits in enumerate(dict.fromkeys(p.bits for p, _ in finished))}
    for point, result in sorted(finished, key=lambda pair: order[pair[0].bits]):
        found.setdefault((point.bits, point.variant), []).append((point, result))
    return found


def means(outcome: Mapping[str, Any]) -> dict[str, float]:
    """Mean over images, by metric."""
    return {metric: float(outcome[metric].mean()) for metric in METRICS}


def averaged(results: Sequence[Result], stage: str) -> Outcome:
    """Each image's mean over the runs that scored it, by metric."""
    images = [result.images for result in results]
    outcomes: list[Outcome] = [getattr(result, stage) for result in results]
    return {metric: pooled([outcome[metric] for outcome in outcomes], images) for metric in METRICS}


def float_top1(results: Sequence[Result]) -> float:
    """Of the float network, in percent, over all images that any run scored."""
    return float(pooled([one.float_top1 for one in results], [one.images for one in results]).mean())


def compare(finished: Finished) -> list[Comparison]:
    """Each variant at each bit-width against the first variant there, image by image."""
    comparisons = []
    baselines: dict[str, dict[str, Any]] = {}
    for (bits, variant), runs in groups(finished).items():
        before, values = (averaged([result for _, result in runs], stage) for stage in STAGES)
        first = baselines.setdefault(bits, values)
        differences = (
            {} if first is values else {m: paired_difference(values[m], first[m]) for m in METRICS}
        )
        comparisons.append(Comparison(bits, variant, len(runs), means(values), means(before), differences))
    return comparisons


def set_effects(finished: Finished, scores: Scores) -> list[SetEffect]:
    """What the set changes of each variant at each bit-width; empty where there is but one set and seed."""
    effects = []
    one_set = len({point.set for point, _ in finished}) == 1
    for (bits, variant), runs in groups(finished).items():
        shared = set.intersection(*(set(result.images) for _, result in runs))
        by_set: dict[str, list[Result]] = {}
        for point, result in runs:
            name = f"seed {point.seed}" if one_set else point.set
            by_set.setdefault(name, []).append(result.of(shared))
        if len(by_set) < 2:
            continue
        values = {name: averaged(results, "reconstructed") for name, results in by_set.items()}
        found = {name: means(of_set) for name, of_set in values.items()}
        columns = {m: [of_set[m] for of_set in found.values()] for m in METRICS}
        known = [scores[name] for name in found] if scores and not one_set else [{}]
        correlations = {
            score: {m: rank_correlation([one[score] for one in known], columns[m]) for m in METRICS}
            for score in known[0]
        }
        spreads = {metric: spread(column) for metric, column in columns.items()}
        own = {m: own_spread(np.stack([of_set[m] for of_set in values.values()])) for m in METRICS}
        top1 = float_top1([result for results in by_set.values() for result in results])
        effects.append(SetEffect(bits, variant, len(shared), top1, found, spreads, own, correlations))
    return effects


def read_scores(path: Path, points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Scores of the runs' sets, from a file that ``select_calibration.py --score ... --json`` wrote.

    A set is known by its images' hash, or else by what it was given as.

    Raises:
        UserError: the file cannot be read, or has no score of a set.
    """
    try:
        rows = json.loads(path.read_text())["sets"]
        scored = {row[key]: _values(row) for key in ("set", "sha256") for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--scores {path}: is no file that select_calibration.py --json wrote") from error
    found = {}
    for point in points:
        known = scored.get(point.sha256) or scored.get(point.images.given)
        if not known:
            raise UserError(f"--scores {path}: has no score of the set {point.images.given}")
        found[point.set] = known
    return found


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a set was ranked by."""
    ranges = row["ranges"] and row["ranges"]["kl"]
    both = {"statistics": row["statistics"], "ranges": ranges}
    return {score: float(value) for score, value in both.items() if value is not None}


def on_val(finished: Finished) -> Finished:
    """The runs with nothing but what the val folder's images say."""
    return [(point, result.on_val()) for point, result in finished]


def markdown(
    finished: Finished,
    comparisons: Sequence[Comparison],
    of_val: Sequence[Comparison],
    effects: Sequence[SetEffect],
) -> str:
    """All tables, those without a row left out.

    Args:
        of_val: the comparisons on val images alone; empty where no others were scored.
    """
    alone = ["Val images alone:", comparison_table(of_val)] if of_val else []
    tables = [runs_table(finished), comparison_table(comparisons), *alone, sets_table(effects)]
    return "\n\n".join(table for table in tables if table)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def _cells(values: Mapping[str, float], sign: str = "") -> list[str]:
    return [f"{values[metric]:{sign}.{DIGITS[metric]}f}" for metric in METRICS]


def runs_table(finished: Finished) -> str:
    """A row per run."""
    titles = ["bits", "variant", "set", "seed", "ranges only, top-1 %", *TITLES.values(), "seconds"]
    rows = []
    for point, result in finished:
        before = f"{result.range_only['top1'].mean():.2f}"
        name = [point.bits, point.variant, point.set, str(point.seed), before]
        rows.append([*name, *_cells(means(result.reconstructed)), f"{sum(result.seconds.values()):.0f}"])
    return _table(titles, rows)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """A row per variant: means, and differences with their 95 % intervals."""
    if not comparisons:
        return ""
    first = comparisons[0].variant
    titles = ["bits", "variant", "runs", *TITLES.values()]
    titles += [f"{title} − {first}" for title in TITLES.values()]  # noqa: RUF001
    rows = []
    for one in comparisons:
        cells = [_interval(one.differences[m], DIGITS[m]) if one.differences else "" for m in METRICS]
        rows.append([one.bits, one.variant, str(one.runs), *_cells(one.means), *cells])
    return _table(titles, rows)


def _interval(found: Difference, digits: int, sign: str = "+") -> str:
    form = f"{sign}.{digits}f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def sets_table(effects: Sequence[SetEffect]) -> str:
    """A row per variant: spreads over the sets, and rank correlations with the scores."""
    if not effects:
        return ""
    scores = list(effects[0].correlations)
    titles = ["bits", "variant", "sets", "images"]
    titles += [f"{title}, spread (sets' own)" for title in TITLES.values()]
    titles += [f"{score} ~ {title}" for score in scores for title in TITLES.values()]
    rows = []
    for one in effects:
        own = [_interval(one.own_spreads[m], DIGITS[m], sign="") for m in METRICS]
        seen = [f"{cell} ({of_sets})" for cell, of_sets in zip(_cells(one.spreads), own, strict=True)]
        ranks = [f"{one.correlations[score][m]:+.2f}" for score in scores for m in METRICS]
        rows.append([one.bits, one.variant, str(len(one.means)), str(one.images), *seen, *ranks])
    return _table(titles, rows)


def run_summary(point: Point, result: Result) -> dict[str, Any]:
    """A run in the JSON."""
    return {
        "bits": point.bits,
        "variant": point.variant,
        "set": point.set,
        "seed": point.seed,
        "calibration_images": len(point.images.paths),
        "sha256": point.sha256,
        "scored_images": len(result.images),
        "float_top1": float(result.float_top1.mean()),
        "range_only": means(result.range_only),
        "reconstructed": means(result.reconstructed),
        "reverted_units": result.reverted,
        "seconds": result.seconds,
    }


def as_json(
    finished: Finished,
    comparisons: Sequence[Comparison],
    of_val: Sequence[Comparison],
    effects: Sequence[SetEffect],
    scores: Scores,
) -> dict[str, Any]:
    """Runs and what they say together, without values of single images; see :func:`markdown`."""
    results = [result for _, result in finished]
    val = [result for _, result in on_val(finished)]
    found = [asdict(one) for one in of_val]
    alone = {"on_val": {"float_top1": float_top1(val), "comparisons": found}} if found else {}
    names = set(chain.from_iterable(result.images for result in results))
    return {
        "val_images": val[0].val_images,
        "other_images": len(names) - val[0].val_images,
        "float_top1": float_top1(results),
        **alone,
        "runs": [run_summary(point, result) for point, result in finished],
        "baseline": finished[0][0].variant,
        "comparisons": [asdict(one) for one in comparisons],
        "sets": [asdict(one) for one in effects],
        "scores": scores,
    }


def require_format(path: Path) -> None:
    """Make sure, before hours of work, that the plot's format is known.

    Raises:
        UserError: it is not.
    """
    if path.suffix[1:] not in PICTURES:
        raise UserError(f"--plot {path}: allowed are names that end in .{' or .'.join(PICTURES)}")


def plot_sets(path: Path, effects: Sequence[SetEffect]) -> None:
    """What each set gives, a column per variant: :data:`PANELS`, at each bit-width.

    Raises:
        UserError: the file cannot be written.
    """
    widths = list(dict.fromkeys(effect.bits for effect in effects))
    columns = max(sum(effect.bits == bits for effect in effects) for bits in widths)
    size = (2.0 + 1.3 * len(PANELS) * columns, 1.0 + 2.8 * len(widths))
    figure = Figure(figsize=size, layout="constrained")
    for bits, row in zip(widths, figure.subplots(len(widths), len(PANELS), squeeze=False), strict=True):
        shown = [effect for effect in effects if effect.bits == bits]
        for axes, (metric, words) in zip(row, PANELS.items(), strict=True):
            _strips(axes, shown, metric)
            axes.set_title(bits)
            axes.set_ylabel(words)
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    write_picture(path, figure)


def _strips(axes: Any, effects: Sequence[SetEffect], metric: str) -> None:
    """A dot per set over each variant's name, and a line from the least to the greatest."""
    sets = list(effects[0].means)
    columns = [[found[metric] for found in effect.means.values()] for effect in effects]
    if metric == "top1":
        pairs = zip(effects, columns, strict=True)
        columns = [[effect.float_top1 - value for value in values] for effect, values in pairs]
    for column, heights in enumerate(columns):
        axes.plot([column, column], [min(heights), max(heights)], color="0.8", lw=3, zorder=1)
        for place, height in enumerate(heights):
            beside = column + 0.3 * (place / (len(sets) - 1) - 0.5)  # so that equal values are all seen
            style = {"color": f"C{place % 10}", "marker": "os^Dv"[place // 10 % 5]}
            axes.plot([beside], [height], ls="", label=None if column else sets[place], **style)
    drawn = [0.0, *finite(height for heights in columns for height in heights)]  # a network may diverge
    low, high = min(drawn), max(drawn)
    air = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - air * (low < 0), high + air)
    names = [effect.variant.replace(",", ",\n") for effect in effects]
    slanted = max(len(line) for name in names for line in name.split("\n")) > LEVEL_LETTERS
    tilt = {"rotation": 30, "ha": "right"} if slanted else {}
    axes.set_xticks(range(len(effects)), names, **tilt)
    axes.set_xlim(-0.5, len(effects) - 0.5)
    axes.grid(axis="y", alpha=0.3)
