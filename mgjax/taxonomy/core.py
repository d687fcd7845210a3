"""Taxonomy: the labels of every level, coarse to fine, and how they are related. Numpy only."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mgjax.errors import InputError

UNKNOWN = -1  # the label of an example that is not known at a level


class TaxonomyError(InputError):
    """The labels do not form a forest, or a label does not belong to it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Taxonomy:
    """An immutable forest of labels, stored level by level from coarse to fine.

    Every leaf reaches the finest level: one that ends early repeats as itself at each deeper
    level (`inherited` marks the repeats), so that a path always has one label per level.
    All roots hang from an implicit common root, which is no level. Label `-1` means "unknown".

    Build one with `from_names`, `from_nested`, `from_edges` or `from_features`, or by `read_taxonomy`,
    `wordnet.taxonomy` or `induced`; the constructor itself takes arrays that are already checked.

    Attributes:
        levels: names of the levels, coarse to fine.
        names: names of the labels, one tuple per level.
        parents: per level an int32 array: the parent's index in the level above (-1 at the top).
        inherited: per level a bool array: True where a label repeats a leaf of the level above.

    Example:
        >>> tree = Taxonomy.from_nested({"animal": ["cat", "dog"], "vehicle": ["car"], "plant": None})
        >>> tree.names[-1]
        ('cat', 'dog', 'car', 'plant')
        >>> tree.lift([0, 2, -1], "level_1", "level_0").tolist()
        [0, 1, -1]
    """

    levels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    parents: tuple[np.ndarray, ...]
    inherited: tuple[np.ndarray, ...]

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_names(
        cls,
        names: Mapping[str, Sequence[str]],
        parents: Mapping[str, Sequence[int | str]] | None = None,
    ) -> Taxonomy:
        """Builds a taxonomy from one list of names per level.

        Args:
            names: level → names of its labels, coarse to fine; the order of a list is the order
                of the label ids, and stays so.
            parents: level → for every label its parent in the level above, by index or by name.
                Needed for every level but the first.

        Raises:
            TaxonomyError: no label, a duplicate name in a level, a label without a parent.

        Example:
            >>> Taxonomy.from_names(
            ...     {"superclass": ["fish", "tree"], "class": ["ray", "oak", "shark"]},
            ...     {"class": ["fish", "tree", "fish"]},
            ... ).parents[1].tolist()
            [0, 1, 0]
        """
        parents = parents or {}
        levels = tuple(names)
        if not levels:
            raise TaxonomyError("a taxonomy needs at least one level")
        if unknown := set(parents) - set(levels[1:]):
            raise TaxonomyError(f"parents are given for {sorted(unknown)}, which is no level below the first of {levels}")
        all_names: list[tuple[str, ...]] = []
        all_parents: list[np.ndarray] = []
        all_inherited: list[np.ndarray] = []
        for depth, level in enumerate(levels):
            own = tuple(str(n) for n in names[level])
            if not own:
                raise TaxonomyError(f"level '{level}' has no labels")
            if repeated := _repeated(own):
                raise TaxonomyError(f"level '{level}' has duplicate names: {repeated[:5]}")
            if depth == 0:
                parent = np.full(len(own), -1, np.int32)
                inherited = np.zeros(len(own), bool)
            else:
                above = all_names[-1]
                parent = _resolve_parents(level, own, parents.get(level), levels[depth - 1], above)
                # Leaves of the level above repeat here, after the level's own labels.
                ended = np.setdiff1d(np.arange(len(above)), parent)
                own += tuple(above[i] for i in ended)
                inherited = np.r_[np.zeros(len(parent), bool), np.ones(len(ended), bool)]
                parent = np.r_[parent, ended].astype(np.int32)
                if repeated := _repeated(own):
                    raise TaxonomyError(f"level '{level}' repeats the names of leaves above it: {repeated[:5]}")
                wrong = all_inherited[-1][parent] & ~inherited
                if wrong.any():
                    raise TaxonomyError(f"level '{level}': '{own[int(np.argmax(wrong))]}' hangs below a leaf that has ended")
            all_names.append(own)
            all_parents.append(parent)
            all_inherited.append(inherited)
        return cls(levels, tuple(all_names), tuple(all_parents), tuple(all_inherited))

    @classmethod
    def from_nested(cls, tree: Mapping[str, object], levels: Sequence[str] | None = None) -> Taxonomy:
        """Builds a taxonomy from nested dicts; a list, a dict or None stands below each name.

        Raises:
            TaxonomyError: a name that occurs twice (it would have two parents).
        """
        edges: list[tuple[str | None, str]] = []

        def walk(parent: str | None, below: object) -> None:
            if below is None:
                return
            children = below.items() if isinstance(below, Mapping) else ((name, None) for name in below)
            for name, deeper in children:
                edges.append((parent, name))
                walk(name, deeper)

        walk(None, tree)
        return cls.from_edges(edges, levels)

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[str | None, str]],
        levels: Sequence[str] | None = None,
        *,
        roots: Sequence[str] | None = None,
    ) -> Taxonomy:
        """Builds a taxonomy from (parent, child) pairs.

        A parent of None declares a root. A single root above everything answers no question
        and is left out.

        Args:
            edges: (parent, child) pairs, in any order.
            levels: names of the levels, coarse to fine (default `level_0`, `level_1`, …).
            roots: if given, the only names that may lack a parent.

        Raises:
            TaxonomyError: a cycle, an orphan (a name without a parent that is no declared
                root), a second parent, an edge given twice, the wrong number of level names.
        """
        parent_of: dict[str, str | None] = {}
        for parent, child in edges:
            if child in parent_of:
                if parent_of[child] == parent:
                    raise TaxonomyError(f"'{child}' is given twice below '{parent}'")
                both = parent_of[child], parent
                if None in both:
                    above = next(p for p in both if p is not None)
                    raise TaxonomyError(f"'{child}' stands at the top and below '{above}' too: leave one of them out")
                raise TaxonomyError(f"'{child}' has a second parent: '{both[0]}' and '{both[1]}'")
            parent_of[child] = parent
        declared = dict.fromkeys([n for n, p in parent_of.items() if p is None] + list(roots or ()))  # in order
        tops = [p for p in parent_of.values() if p is not None and p not in parent_of]
        if roots is not None or declared:
            for name in tops:
                if name not in declared:
                    raise TaxonomyError(f"'{name}' is an orphan: it has children, but no parent, and is no root")
        for name in [*tops, *declared]:
            parent_of.setdefault(name, None)
        if not parent_of:
            raise TaxonomyError("a taxonomy needs at least one label")

        children: dict[str | None, list[str]] = {}
        for name, parent in parent_of.items():
            children.setdefault(parent, []).append(name)
        by_level = [children.get(None, [])]
        while below := [c for n in by_level[-1] for c in children.get(n, [])]:
            by_level.append(below)
        if lost := set(parent_of) - {n for level in by_level for n in level}:
            raise TaxonomyError(f"a cycle: {sorted(lost)[:5]} never reach a root")
        if len(by_level) > 1 and len(by_level[0]) == 1:
            by_level = by_level[1:]
        if levels is None:
            levels = [f"level_{i}" for i in range(len(by_level))]
        if len(levels) != len(by_level):
            raise TaxonomyError(f"the tree has {len(by_level)} levels, but {len(levels)} names: {list(levels)}")
        return cls.from_names(
            dict(zip(levels, by_level)),
            {level: [parent_of[n] for n in nodes] for level, nodes in list(zip(levels, by_level))[1:]},
        )

    @classmethod
    def from_features(
        cls,
        features: Mapping[str, object],
        levels: Sequence[str] = (),
        *,
        labels: Mapping[str, np.ndarray] | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> Taxonomy:
        """Builds a taxonomy from the ClassLabel features of a TFDS dataset.

        TFDS knows the names of each level, but not which class belongs to which superclass:
        that is read from the examples' own labels.

        Args:
            features: a TFDS `FeaturesDict`, or any mapping to objects with `names`.
            levels: features that are levels, coarse to fine; by default every ClassLabel,
                by number of classes.
            labels: feature → int array [examples]. Needed with two levels or more.
            rename: feature → name of the level.

        Raises:
            TaxonomyError: no ClassLabel, an unknown feature, a class seen below two parents,
                a class that no example shows (its parent cannot be known).
        """
        known = {k: f for k, f in features.items() if getattr(f, "names", None)}
        if not known:
            raise TaxonomyError(f"none of the features {sorted(features)} is a ClassLabel with names")
        if unknown := [l for l in levels if l not in known]:
            raise TaxonomyError(f"no ClassLabel feature {unknown}; there are {sorted(known)}")
        chosen = tuple(levels) or tuple(sorted(known, key=lambda k: len(known[k].names)))
        rename = rename or {}
        parents = {}
        for coarse, fine in itertools.pairwise(chosen):
            if labels is None:
                raise TaxonomyError("labels are needed to find the parents of a taxonomy with several levels")
            parents[rename.get(fine, fine)] = _observed_parents(
                np.asarray(labels[fine]), np.asarray(labels[coarse]), known[fine].names, known[coarse].names
            )
        return cls.from_names({rename.get(l, l): known[l].names for l in chosen}, parents)

    # ------------------------------------------------------------------ questions

    def index(self, level: str) -> int:
        """Position of a level, 0 = coarsest. Raises TaxonomyError for an unknown one."""
        try:
            return self.levels.index(level)
        except ValueError:
            raise TaxonomyError(f"no level '{level}'; the taxonomy has {list(self.levels)}") from None

    def size(self, level: str) -> int:
        """Number of labels at a level, the repeats of leaves that ended above it included."""
        return len(self.names[self.index(level)])

    def ancestors(self, source: str, target: str) -> np.ndarray:
        """int32 [size(source)]: for every label of `source` its ancestor at the coarser `target`."""
        low, high = self.index(source), self.index(target)
        if high > low:
            raise TaxonomyError(f"'{target}' is finer than '{source}': labels are lifted from fine to coarse")
        result = np.arange(len(self.names[low]), dtype=np.int32)
        for depth in range(low, high, -1):
            result = self.parents[depth][result]
        return result

    def ancestor_matrix(self, source: str, target: str) -> np.ndarray:
        """float32 [size(source), size(target)]: 1 where the column is the row's ancestor."""
        return np.eye(self.size(target), dtype=np.float32)[self.ancestors(source, target)]

    def lift(self, labels, source: str, target: str) -> np.ndarray:
        """Labels of `source` as labels of the coarser `target`; unknown (-1) stays unknown.

        Raises:
            TaxonomyError: a label outside [-1, size(source)).
        """
        labels = np.asarray(labels)
        self.check(labels, source)
        return np.where(labels < 0, UNKNOWN, self.ancestors(source, target)[labels]).astype(np.int32)

    def check(self, labels, level: str, where: str = "") -> None:
        """Raises TaxonomyError, naming the first label that is outside [-1, size(level))."""
        labels = np.asarray(labels)
        wrong = (labels < UNKNOWN) | (labels >= self.size(level))
        if wrong.any():
            at = int(np.argmax(wrong.ravel()))
            raise TaxonomyError(
                f"label {labels.ravel()[at]} at position {at}{where} is outside level '{level}', "
                f"which has {self.size(level)} labels (-1 = unknown)"
            )

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """int32 [leaves, levels]: for every leaf its label at each level, coarse to fine."""
        finest = self.levels[-1]
        return np.stack([self.ancestors(finest, level) for level in self.levels], axis=1)

    @functools.cached_property
    def leaf_depth(self) -> np.ndarray:
        """int32 [leaves]: levels a leaf really has, 1 = it ends at the coarsest."""
        own = [~flags[self.paths[:, depth]] for depth, flags in enumerate(self.inherited)]
        return np.sum(own, axis=0).astype(np.int32)

    @functools.cached_property
    def heights(self) -> tuple[np.ndarray, ...]:
        """Per level an int32 array: edges from a label down to its deepest leaf."""
        result = [np.zeros(len(self.names[-1]), np.int32)]
        for depth in range(len(self.levels) - 1, 0, -1):
            height = np.zeros(len(self.names[depth - 1]), np.int32)
            np.maximum.at(height, self.parents[depth], np.where(self.inherited[depth], 0, result[0] + 1))
            result.insert(0, height)
        return tuple(result)

    @property
    def root_height(self) -> int:
        """Edges from the implicit common root down to the deepest leaf."""
        return int(self.heights[0].max()) + 1

    def lca_depth(self, a, b) -> np.ndarray:
        """int32: depth of the lowest common ancestor of leaves `a` and `b` (0 = implicit root)."""
        a, b = np.asarray(a), np.asarray(b)
        shared = np.cumprod(self.paths[a] == self.paths[b], axis=-1).sum(-1)
        return np.minimum(shared, np.minimum(self.leaf_depth[a], self.leaf_depth[b])).astype(np.int32)

    def distance(self, a, b) -> np.ndarray:
        """int32: number of edges on the way from leaf `a` to leaf `b` through their LCA; a metric."""
        return self.leaf_depth[np.asarray(a)] + self.leaf_depth[np.asarray(b)] - 2 * self.lca_depth(a, b)

    def upto(self, level: str) -> Taxonomy:
        """The taxonomy cut below `level`: its labels become the leaves."""
        n = self.index(level) + 1
        return Taxonomy(self.levels[:n], self.names[:n], self.parents[:n], self.inherited[:n])

    def select(self, levels: Sequence[str]) -> Taxonomy:
        """The taxonomy of some of its levels, the finest among them; ids of labels stay what they are.

        A leaf that ends at a level that is left out counts as a label of the next level that is there.

        Raises:
            TaxonomyError: an unknown level, levels that do not run from coarse to fine, or end above the finest.
        """
        chosen = [self.index(level) for level in levels]
        if chosen != sorted(set(chosen)) or not chosen:
            raise TaxonomyError(f"levels run from coarse to fine, as {list(self.levels)} do, not as {list(levels)}")
        if chosen[-1] != len(self.levels) - 1:
            raise TaxonomyError(
                f"'{self.levels[-1]}', the finest level, holds the classes and cannot be left out of {list(levels)}"
            )
        parents = [np.full(len(self.names[chosen[0]]), -1, np.int32)]
        inherited = [np.zeros(len(self.names[chosen[0]]), bool)]
        for high, low in itertools.pairwise(chosen):
            repeats = np.ones(len(self.names[low]), bool)  # from level `high` all the way down
            for depth in range(high + 1, low + 1):
                repeats &= self.inherited[depth][self.ancestors(self.levels[low], self.levels[depth])]
            parents.append(self.ancestors(self.levels[low], self.levels[high]))
            inherited.append(repeats)
        return Taxonomy(tuple(levels), tuple(self.names[i] for i in chosen), tuple(parents), tuple(inherited))

    def path_names(self, leaf: int) -> tuple[str, ...]:
        """Names along a leaf's path, coarse to fine, without the repeats."""
        return tuple(self.names[d][i] for d, i in enumerate(self.paths[leaf][: self.leaf_depth[leaf]]))

    # ------------------------------------------------------------------ identity

    def to_json(self) -> dict:
        """A JSON-ready dict from which `from_json` makes the same taxonomy."""
        own = [~flags for flags in self.inherited]
        return {
            "names": {l: [n for n, keep in zip(ns, o) if keep] for l, ns, o in zip(self.levels, self.names, own)},
            "parents": {l: p[o].tolist() for l, p, o in list(zip(self.levels, self.parents, own))[1:]},
        }

    @classmethod
    def from_json(cls, data: Mapping) -> Taxonomy:
        """Inverse of `to_json`."""
        return cls.from_names(data["names"], data["parents"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any name, level or edge."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    def __eq__(self, other) -> bool:
        return isinstance(other, Taxonomy) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        shape = " → ".join(f"{level}:{len(names)}" for level, names in zip(self.levels, self.names))
        return f"Taxonomy({shape}, {self.fingerprint})"


def _repeated(names) -> list[str]:
    return sorted(name for name, count in collections.Counter(names).items() if count > 1)


def _resolve_parents(level, own, given, above_level, above_names) -> np.ndarray:
    if given is None or len(given) != len(own):
        raise TaxonomyError(f"level '{level}' has {len(own)} labels and {0 if given is None else len(given)} parents")
    at = {name: i for i, name in enumerate(above_names)}
    result = []
    for name, parent in zip(own, given):
        index = at.get(parent, -1) if isinstance(parent, str) else int(parent)
        if not 0 <= index < len(above_names):
            raise TaxonomyError(f"'{name}' of level '{level}' is an orphan: '{parent}' is not in level '{above_level}'")
        result.append(index)
    return np.asarray(result, np.int32)


def _observed_parents(fine, coarse, fine_names, coarse_names) -> list[int]:
    known = (fine >= 0) & (coarse >= 0)
    pairs = np.unique(np.stack([fine[known], coarse[known]], 1), axis=0)
    children, counts = np.unique(pairs[:, 0], return_counts=True)
    for child in children[counts > 1]:
        both = [coarse_names[p] for c, p in pairs if c == child]
        raise TaxonomyError(f"'{fine_names[child]}' has a second parent: examples show it below {both}")
    if missing := sorted(set(range(len(fine_names))) - set(children.tolist())):
        raise TaxonomyError(f"no example shows '{fine_names[missing[0]]}': its parent cannot be known")
    return pairs[:, 1].tolist()
