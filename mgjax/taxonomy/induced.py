"""Induced taxonomies: levels found by clustering what a flat classifier has learned of its classes."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from mgjax.taxonomy.core import Taxonomy, TaxonomyError

Linkage = Literal["ward", "average"]
LINKAGES: tuple[Linkage, ...] = ("ward", "average")


def from_weights(
    weights, names: Sequence[str], groups: Sequence[int], *, levels: Sequence[str] | None = None, linkage: Linkage = "ward"
) -> Taxonomy:
    """Clusters classes by the cosine of their weight vectors in the last layer (NBDT, Wan et al. 2020, arXiv:2004.00221).

    Args:
        weights: [classes, features]; of a Flax Dense kernel the transpose.
        names: of the classes; their order is that of the label ids of the finest level.
        groups: numbers of groups, coarse to fine, one per level above the classes.
        levels: names of all levels, the classes' included (default `groupsN`, …, `class`).
        linkage: "ward" (least growth of the variance of the vectors, brought to unit length; as in
            NBDT) or "average" (smallest mean of 1 − cosine).

    Raises:
        TaxonomyError: a wrong shape; a vector that is zero or not finite; numbers of groups that
            do not grow, or are not between 1 and the number of classes.

    Example:
        >>> tree = from_weights([[1, 0], [0, 1], [1, 0.2], [0.1, 1]], ["cat", "car", "dog", "bus"], [2])
        >>> tree.names[0], tree.parents[1].tolist()
        (('cat / dog', 'car / bus'), [0, 1, 0, 1])
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 2:
        raise TaxonomyError(f"weights are [classes, features], not of shape {weights.shape}")
    _check_names(names, len(weights), "vectors")
    if linkage not in LINKAGES:
        raise TaxonomyError(f"no linkage '{linkage}'; there are {', '.join(LINKAGES)}")
    _check_rows(np.isfinite(weights).all(1), names, "has a weight vector that is not finite")
    _check_rows((weights != 0).any(1), names, "has a weight vector of zeros, which points nowhere")
    unit = weights / np.abs(weights).max(1, keepdims=True)  # so that no square overflows or vanishes
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distance = np.maximum(2 - 2 * unit @ unit.T, 0)  # squared, of unit vectors: 2 (1 − cosine)
    return _cluster(np.sqrt(distance) if linkage == "ward" else distance / 2, names, groups, levels, linkage)


def from_confusion(confusion, names: Sequence[str], groups: Sequence[int], *, levels: Sequence[str] | None = None) -> Taxonomy:
    """Clusters classes that are taken for each other, by average linkage.

    Rows are normalised, so that a frequent class counts no more than a rare one; the similarity
    of two classes is the mean of both directions, their distance 1 − similarity. Pairs that are never confused
    are all equally far; how they join depends on the order of the classes alone.

    Args:
        confusion: [classes, classes]; how often (or how probably) the row's class was taken for the column's.
        names, groups, levels: as in `from_weights`.

    Raises:
        TaxonomyError: as in `from_weights`; a negative number, a class that never occurred.
    """
    confusion = np.asarray(confusion, np.float64)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise TaxonomyError(f"a confusion matrix is [classes, classes], not of shape {confusion.shape}")
    _check_names(names, len(confusion), "rows")
    _check_rows(np.isfinite(confusion).all(1), names, "has a count that is not finite")
    _check_rows((confusion >= 0).all(1), names, "has a negative count")
    _check_rows(confusion.sum(1) > 0, names, "never occurred: its row is zero")
    share = confusion / confusion.sum(1, keepdims=True)
    return _cluster(1 - (share + share.T) / 2, names, groups, levels, "average")


def _cluster(distance: np.ndarray, names, groups, levels, linkage: Linkage) -> Taxonomy:
    """Agglomerates classes and cuts the dendrogram at so many groups; the same input gives the same groups, ties included."""
    classes, groups = len(names), [int(g) for g in groups]
    if not all(1 < g < classes for g in groups) or sorted(set(groups)) != groups:
        raise TaxonomyError(f"numbers of groups grow from level to level, between 1 and {classes} classes; got {groups}")
    levels = list(levels) if levels is not None else [*(f"groups{g}" for g in groups), "class"]
    if len(levels) != len(groups) + 1:
        raise TaxonomyError(f"{len(groups) + 1} names of levels are needed, the classes' included; got {levels}")
    if len(set(levels)) < len(levels):
        raise TaxonomyError(f"two levels have one name: {levels}")
    if not groups:
        return Taxonomy.from_names({levels[0]: names})
    # Rounded, so that the last bit of a sum, which differs between machines, breaks no tie.
    distance = np.round((distance + distance.T) / 2, 9)
    np.fill_diagonal(distance, 0)
    merges = hierarchy.linkage(squareform(distance), linkage)
    above = np.zeros(classes, np.int64)
    all_names, parents = {}, {}
    for level, count in zip(levels, groups):
        raw = hierarchy.cut_tree(merges, count)[:, 0]
        order = {group: i for i, group in enumerate(dict.fromkeys(raw.tolist()))}
        own = np.array([order[group] for group in raw.tolist()])
        members = [np.flatnonzero(own == i) for i in range(count)]
        if all_names:
            parents[level] = [int(above[m[0]]) for m in members]
        all_names[level] = _titles([[names[i] for i in m] for m in members])
        above = own
    return Taxonomy.from_names(all_names | {levels[-1]: names}, parents | {levels[-1]: above.tolist()})


def _titles(groups: Sequence[Sequence[str]]) -> list[str]:
    """A group is called by its first members."""
    titles = [" / ".join(members[:3]) + (f" +{len(members) - 3}" if len(members) > 3 else "") for members in groups]
    return [title if titles.count(title) == 1 else f"{title} (group {i + 1})" for i, title in enumerate(titles)]


def _check_names(names: Sequence[str], count: int, what: str) -> None:
    if len(names) != count:
        raise TaxonomyError(f"{len(names)} names of classes for {count} {what}")
    if repeated := [n for n, times in collections.Counter(names).items() if times > 1]:
        raise TaxonomyError(f"two classes are called '{repeated[0]}'")
    if count < 2:
        raise TaxonomyError(f"{count} class(es) cannot be clustered")


def _check_rows(good: np.ndarray, names: Sequence[str], says: str) -> None:
    if not good.all():
        raise TaxonomyError(f"class '{names[int(np.argmin(good))]}' {says}")
