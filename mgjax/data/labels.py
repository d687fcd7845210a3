"""From the classes or label paths of a dataset to its taxonomy, and to labels at every level."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from mgjax.data.sources import DataError
from mgjax.taxonomy import UNKNOWN, Taxonomy, TaxonomyError, read_taxonomy, wordnet

WORDNET = "wordnet"
Labels = dict[str, np.ndarray]  # level → int32, by class or by example


def class_taxonomy(classes: Sequence[str], taxonomy: str, levels: Sequence[str], name: str) -> tuple[Taxonomy, Labels]:
    """The taxonomy above a flat list of classes, and what each class is at each level.

    Args:
        classes: names, in the order of the dataset's label ids.
        taxonomy: path of a file whose leaves are the classes (it may have more; a class may also be an
            inner label, and is then unknown below its level), "wordnet", or "" for WordNet where all
            classes are wnids and for a single level elsewhere.
        levels: WordNet's levels (see `wordnet.taxonomy`), those of the file to keep, or a name for the
            single level.
        name: of the dataset, for messages.

    Returns:
        (taxonomy, level → int32 [classes]).

    Raises:
        TaxonomyError: classes that the taxonomy does not know, levels that it does not have.

    Example:
        >>> tree, labels = class_taxonomy(["n02123045", "n01440764", "n04285008"], "", ["groups:2"], "toy")
        >>> tree.names[0], labels["groups2"].tolist()
        (('vertebrate', 'sports car'), [0, 0, 1])
    """
    try:
        if taxonomy and taxonomy != WORDNET:
            tree = read_taxonomy(taxonomy)
            table = _find(tree, classes, taxonomy)
            if levels:
                table = table[:, [tree.index(level) for level in levels]]
                tree = tree.select(levels)
        else:
            if taxonomy == WORDNET or all(wordnet.is_wnid(c) for c in classes):
                tree = wordnet.taxonomy(classes, levels)
            elif len(levels) > 1:
                raise TaxonomyError(f"there is one level of classes, but data.levels names {list(levels)}; give data.taxonomy")
            else:
                tree = Taxonomy.from_names({levels[0] if levels else "class": classes})
            table = tree.paths  # the finest level is the classes, in their order
    except TaxonomyError as error:
        raise TaxonomyError(f"{name}: {error}") from None
    return tree, {level: table[:, i].astype(np.int32) for i, level in enumerate(tree.levels)}


def _find(tree: Taxonomy, classes: Sequence[str], path: str) -> np.ndarray:
    """int32 [classes, levels]: labels of classes by name; -1 below an inner label."""
    rows = {}
    for depth in range(len(tree.levels)):  # a name that stands at several levels means the finest
        for label in np.flatnonzero(~tree.inherited[depth]):
            leaf = int(np.argmax(tree.paths[:, depth] == label))  # the first below the label, or itself
            row = tree.paths[leaf].copy()
            if tree.leaf_depth[leaf] > depth + 1:
                row[depth + 1 :] = UNKNOWN
            rows[tree.names[depth][label]] = row
    if missing := [c for c in classes if c not in rows]:
        shown = ", ".join(f"'{c}'" for c in missing[:5])
        raise TaxonomyError(
            f"'{path}' lacks {len(missing)} of {len(classes)} classes: {shown}{', …' if len(missing) > 5 else ''}"
        )
    return np.stack([rows[c] for c in classes])


def path_taxonomy(paths: Sequence[tuple[str, ...]], levels: Sequence[str], name: str) -> tuple[Taxonomy, Labels]:
    """The taxonomy that the examples' own paths of labels, coarse to fine, span.

    A path that ends above the finest level is a leaf that ends early if no other path goes on below
    it; if one does, the example's label is unknown (-1) below. An empty path is unknown throughout. Labels
    are sorted by path; a name that stands twice at one level is given with its path, as in "plant/other".

    Returns:
        (taxonomy, level → int32 [examples]).

    Raises:
        DataError: no label at all.
        TaxonomyError: another number of names than there are levels.

    Example:
        >>> tree, labels = path_taxonomy([("animal", "cat"), ("animal",), ("plant",)], ["kind", "class"], "toy")
        >>> tree.names[1], labels["class"].tolist()
        (('cat', 'plant'), [0, -1, 1])
    """
    kinds = set(paths)
    nodes = sorted({p[: k + 1] for p in kinds for k in range(len(p))})
    if not nodes:
        raise DataError(f"{name}: no example has a label")
    inner = {n[:-1] for n in nodes}
    width = max(map(len, nodes))
    if width != len(levels):
        raise TaxonomyError(f"{name}: labels have up to {width} levels, but data.levels names {len(levels)}: {list(levels)}")
    # A leaf that ends early stands at each deeper level too.
    stands = {n: range(len(n), len(n) + 1 if n in inner else width + 1) for n in nodes}
    times = collections.Counter((depth, n[-1]) for n in nodes for depth in stands[n])
    title = {n: n[-1] if all(times[depth, n[-1]] == 1 for depth in stands[n]) else "/".join(n) for n in nodes}
    by_level = [[n for n in nodes if len(n) == depth] for depth in range(1, width + 1)]
    index = {n: i for own in by_level for i, n in enumerate(own)}
    try:
        tree = Taxonomy.from_names(
            {level: [title[n] for n in own] for level, own in zip(levels, by_level)},
            {level: [index[n[:-1]] for n in own] for level, own in list(zip(levels, by_level))[1:]},
        )
    except TaxonomyError as error:
        raise TaxonomyError(f"{name}: {error}") from None
    rows = {(): np.full(width, UNKNOWN)}
    for leaf, path in enumerate(tree.paths):
        rows[by_level[tree.leaf_depth[leaf] - 1][path[tree.leaf_depth[leaf] - 1]]] = path
    for n in inner - {()}:
        rows[n] = np.array([index[n[: k + 1]] for k in range(len(n))] + [UNKNOWN] * (width - len(n)))
    table = np.stack([rows[p] for p in paths]).astype(np.int32)
    return tree, {level: table[:, i] for i, level in enumerate(levels)}
