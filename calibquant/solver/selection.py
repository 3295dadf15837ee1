"""Strategies: which of the candidates become the calibration set. No I/O happens here.

Some go by class folders alone. The others go by what candidates do to the float network's batch norms,
:mod:`activation_statistics`: their moments make a Gram matrix, after which the network's width no longer
matters.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from calibquant.solver.activation_statistics import (
    deviation_features,
    gram_matrix,
    image_features,
    statistics_distance,
)

Candidates = dict[str, list[str]]
"""Class folder -> its images, sorted, as ``class/[subfolder/]file`` relative to the train folder."""

Strategy = Callable[[Candidates, int, random.Random, bool], list[str]]
"""Chooses ``num`` of the candidates; where the last argument is true, at least one of each class."""


@dataclass(frozen=True)
class Pool:
    """Candidates that have run through the network.

    Attributes:
        files: as in :data:`Candidates`.
        moments: of each, ``[n, 2, C]``.
        weights: of channels, ``[C]``.
        network: SHA-256 over the network's own weights.
    """

    files: list[str]
    moments: Tensor
    weights: Tensor
    network: str = ""

    def distance(self, files: list[str]) -> float:
        """:func:`statistics_distance` of a set of these files."""
        chosen = set(files)
        rows = [number for number, file in enumerate(self.files) if file in chosen]
        return statistics_distance(self.moments[rows].mean(dim=0, dtype=torch.float64), self.weights)

    def by_class(self) -> Candidates:
        """The same files, by class folder."""
        found: Candidates = {}
        for file in self.files:
            found.setdefault(class_of(file), []).append(file)
        return found

    def class_numbers(self) -> NDArray[np.intp]:
        """The number of each file's class, ``[n]``."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(class_of(file), len(numbers)) for file in self.files])


PoolStrategy = Callable[[Pool, int, random.Random, bool], list[str]]
"""Chooses ``num`` files of the pool; where the last argument is true, at least one of each class."""


def class_of(file: str) -> str:
    """Class folder of a candidate."""
    return file.split("/", 1)[0]


def without(candidates: Candidates, taken: set[str]) -> list[str]:
    """All candidates but those taken."""
    return [file for images in candidates.values() for file in images if file not in taken]


def spare(file: str, candidates: Candidates, taken: set[str], draw: random.Random) -> str | None:
    """A candidate in another's place: of its class, or of any where its class has no other."""
    same_class = [other for other in candidates[class_of(file)] if other not in taken]
    left = same_class or without(candidates, taken)
    return draw.choice(left) if left else None


def choose_random(candidates: Candidates, num: int, draw: random.Random, cover: bool = True) -> list[str]:
    """One image of every class, if classes are to be covered; the rest from all images alike."""
    chosen = [draw.choice(images) for images in candidates.values()] if cover else []
    return chosen + draw.sample(without(candidates, set(chosen)), num - len(chosen))


def choose_class_balanced(
    candidates: Candidates, num: int, draw: random.Random, cover: bool = True
) -> list[str]:
    """As many images of each class as of any other, where classes are large enough.

    Args:
        cover: changes nothing: this covers as many classes as ``num`` allows.
    """
    shuffled = {name: draw.sample(images, len(images)) for name, images in candidates.items()}
    chosen: list[str] = []
    while len(chosen) < num:
        nonempty = [images for images in shuffled.values() if images]
        for images in draw.sample(nonempty, min(len(nonempty), num - len(chosen))):
            chosen.append(images.pop())
    return chosen


def choose_bn_statistics(pool: Pool, num: int, draw: random.Random, cover: bool = True) -> list[str]:
    """A set with nearly the activation statistics that batch norm kept from training.

    A random draw whose images are exchanged for others as long as that brings the set nearer, by the
    squared norm of its mean :func:`deviation_features`. Herding (Welling, ICML 2009) picks images one by
    one to the same end; exchanges start elsewhere at each seed and end as near.
    """
    gram = gram_matrix(pool.moments, pool.weights, deviation_features).numpy()
    place = {file: number for number, file in enumerate(pool.files)}
    start = [place[file] for file in choose_random(pool.by_class(), num, draw, cover)]
    chosen = exchange(gram, start, pool.class_numbers() if cover else None)
    return [pool.files[number] for number in chosen]


def exchange(
    gram: NDArray[np.float64], start: list[int], classes: NDArray[np.intp] | None = None
) -> list[int]:
    """Exchange members of a set one at a time, each for the best other, until no exchange helps.

    Args:
        gram: inner products ``[n, n]``; the squared norm of the set's mean falls.
        start: numbers of the set's members.
        classes: ``[n]``; a class that has members keeps one. None for no such demand.
    """
    chosen = list(start)
    inside = np.zeros(len(gram), dtype=bool)
    inside[chosen] = True
    norms, sums = gram.diagonal(), gram[:, chosen].sum(axis=1)
    members = None if classes is None else np.bincount(classes[chosen], minlength=classes.max() + 1)
    least = 1e-9 * len(chosen) * np.abs(norms).mean()  # smaller gains are rounding
    improved = True
    while improved:
        improved = False
        for place, old in enumerate(chosen):
            without_old = sums - gram[:, old]
            gain = (2 * without_old + norms)[old] - (2 * without_old + norms)
            gain[inside] = -np.inf
            if classes is not None and members is not None and members[classes[old]] == 1:
                gain[classes != classes[old]] = -np.inf
            new = int(gain.argmax())
            if not gain[new] > least:  # nor where it is NaN
                continue
            chosen[place], improved = new, True
            inside[old], inside[new] = False, True
            sums = without_old + gram[:, new]
            if classes is not None and members is not None:
                members[classes[old]] -= 1
                members[classes[new]] += 1
    return chosen


COMPONENTS = 64
"""Principal components in which images are clustered; distances in more are all alike."""


def choose_clustering(pool: Pool, num: int, draw: random.Random, cover: bool = True) -> list[str]:
    """The image nearest to each of ``num`` centres of clusters of alike activation statistics.

    K-means on all layers' :func:`image_features` at once, reduced to their principal components. SelectQ
    (Zhang et al., Machine Intelligence Research 2025) clusters activation statistics layer by layer, with
    a distance of its own.
    """
    gram = gram_matrix(pool.moments, pool.weights, image_features).numpy()
    points = principal_components(gram, COMPONENTS)
    start = points[draw.sample(range(len(points)), num)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a cluster is empty: its centre stays where it was
        centres, _ = kmeans2(points, start, iter=50, minit="matrix")
    distances = cdist(centres, points, "sqeuclidean")
    chosen = nearest_images(distances, pool.class_numbers() if cover else None)
    return [pool.files[number] for number in chosen]


def principal_components(gram: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Principal components ``[n, at most count]`` of points whose inner products ``[n, n]`` are given."""
    means = gram.mean(axis=0)
    centred = gram - means - means[:, None] + means.mean()
    first = max(len(gram) - count, 0)
    values, vectors = eigh(centred, subset_by_index=[first, len(gram) - 1])
    components: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values, 0))
    return components


def nearest_images(
    distances: NDArray[np.float64], classes: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """An image for each centre, no image twice, of the least sum of distances.

    Where classes are to be covered, each first finds a centre for one of its images, the others follow.

    Args:
        distances: ``[centres, n]``, no fewer images than centres, and no fewer centres than classes.
        classes: ``[n]``, or None for no such demand.
    """
    centres = images = np.array([], dtype=np.intp)
    if classes is not None:
        members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
        best = np.stack([distances[:, some].min(axis=1) for some in members], axis=1)
        centres, found = linear_sum_assignment(best)
        pairs = zip(centres, found, strict=True)
        images = np.array([members[c][distances[k, members[c]].argmin()] for k, c in pairs])
    left = np.setdiff1d(np.arange(len(distances)), centres)
    rest = np.setdiff1d(np.arange(distances.shape[1]), images)
    _, columns = linear_sum_assignment(distances[np.ix_(left, rest)])
    return np.concatenate([images, rest[columns]])


STRATEGIES: dict[str, Strategy] = {"random": choose_random, "class_balanced": choose_class_balanced}
"""Strategies that go by class folders."""
POOL_STRATEGIES: dict[str, PoolStrategy] = {
    "bn_statistics": choose_bn_statistics,
    "clustering": choose_clustering,
}
"""Strategies that go by activations of the float network."""
