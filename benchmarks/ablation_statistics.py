"""The arithmetic of an ablation: paired comparisons on the same images, spreads and ranks over sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor
from torch.nn import functional as F

Values = NDArray[np.float64]
"""A number per image, ``[images]``."""

CONFIDENCE = 0.95
RESAMPLES = 9999
BATCH = 100
"""Resamples held in memory at a time; all of ImageNet's val at once would take gigabytes."""
TEMPERATURES = (0.1, 10.0)
"""Between which :func:`fitted_temperature` looks."""


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval's bounds; NaN of a single image, and where a network diverged."""

    mean: float
    low: float
    high: float


def pooled(runs: Sequence[Values], images: Sequence[Sequence[str]]) -> Values:
    """Each image's mean over the runs that scored it: what differs is then the variant, no seed or set.

    Args:
        images: each run's, by name; of the result in the order in which they first stand.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(chain.from_iterable(images)))}
    sums, counts = np.zeros((2, len(places)))
    for values, names in zip(runs, images, strict=True):
        where = [places[name] for name in names]
        sums[where] += values
        counts[where] += 1
    return sums / counts


def paired_difference(found: Values, baseline: Values, seed: int = 0) -> Difference:
    """Mean of ``found - baseline`` over the same images, with a percentile bootstrap interval.

    Images are resampled, each with both of its values (Efron & Tibshirani 1993, chapter 13). The interval
    says what other images would change; runs that were pooled before are taken as they are.
    """
    difference = found - baseline
    mean = float(difference.mean())
    if len(difference) < 2 or not np.isfinite(mean):
        return Difference(mean, np.nan, np.nan)
    interval = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high))


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest; NaN where a network diverged."""
    return float(np.ptp(values))


def own_spread(values: NDArray[np.float64]) -> Difference:
    """The spread that as many sets would have if endlessly many images were scored, with its interval.

    Each image answers to each set in its own way, so that the means of sets alike in everything differ,
    too: the fewer images, the more. A two-way analysis of variance without replication, sets at random,
    says by how much (Searle, Casella & McCulloch, Variance Components, 1992, chapter 3); what is left of
    the variance of the means is the sets' own. The range of as many normal draws with that variance is
    given, in the median (Tukey's studentized range).

    Args:
        values: ``[sets, images]``, of the same images.
    """
    sets, images = values.shape
    if images < 2 or not np.isfinite(values).all():
        return Difference(np.nan, np.nan, np.nan)
    means = values.mean(axis=1)
    residuals = values - values.mean(axis=0) - means[:, None] + means.mean()
    freedom = (sets - 1, (sets - 1) * (images - 1))
    error = float((residuals**2).sum()) / freedom[1] / images
    seen = float(means.var(ddof=1))
    tail = (1 - CONFIDENCE) / 2
    ratios = 1.0, float(stats.f.isf(tail, *freedom)), float(stats.f.ppf(tail, *freedom))
    width = float(stats.studentized_range.median(sets, np.inf))
    return Difference(*(width * max(0.0, seen / ratio - error) ** 0.5 for ratio in ratios))


def rank_correlation(scores: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN for fewer than three sets, or where one side does not vary."""
    if len(scores) < 3 or len(set(scores)) < 2 or len(set(values)) < 2:
        return float("nan")
    return float(stats.spearmanr(scores, values).statistic)


def fitted_temperature(logits: Tensor, targets: Tensor) -> float:
    """What logits are divided by for their softmax to give each class's chance (Guo et al., ICML 2017).

    The one of least cross-entropy; a network that is too sure of itself has more than 1.

    Args:
        logits: ``[n, classes]``.
        targets: ``[n]``.
    """
    exact = logits.double()

    def cross_entropy(log_temperature: float) -> float:
        return float(F.cross_entropy(exact / np.exp(log_temperature), targets))

    found = optimize.minimize_scalar(cross_entropy, bounds=np.log(TEMPERATURES), method="bounded")
    return float(np.exp(found.x))
