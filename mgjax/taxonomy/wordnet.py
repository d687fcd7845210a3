"""WordNet: coarser levels for classes that are named by wnids, as ImageNet's are.

The table `third_party/wordnet/synsets.tsv` knows the 1,000 classes of ILSVRC-2012 and all their ancestors. A level is
a set of synsets at which WordNet's tree is cut: each class belongs to the nearest synset of the set above it. A finer
level keeps all cuts of the coarser ones, so levels nest by construction.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
from collections.abc import Mapping, Sequence

from mgjax.taxonomy.core import Taxonomy, TaxonomyError

TABLE = "synsets.tsv"
CLASS = "class"  # the finest level
REST = "other"
_WNID = re.compile(r"n\d{8}")


def is_wnid(name: str) -> bool:
    """Whether a name has the form of a noun synset's wnid: "n" and eight digits."""
    return bool(_WNID.fullmatch(name))


@dataclasses.dataclass(frozen=True)
class Synset:
    """One row of the table: the wnid of the hypernym ("" at the root) and the words, the usual one first."""

    parent: str
    lemmas: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.lemmas[0].replace("_", " ")


def taxonomy(wnids: Sequence[str], levels: Sequence[str] = (), *, table: str | pathlib.Path | None = None) -> Taxonomy:
    """Builds a taxonomy whose finest level, `class`, holds the given wnids in the given order.

    Each item of `levels`, coarse to fine, is one of

    * `groups:N`: N groups of sizes as even as the tree allows: time and again the synset is cut out that splits
      a group most evenly, i.e. with the largest a · b for parts of a and b classes (ties: the higher
      synset, then the smaller wnid);
    * `depth:N`: the classes' ancestors N edges below WordNet's root, "entity"; a class that is not
      that deep stands alone;
    * `named:A+B+…`: the synsets of these lemmas or wnids. A class below none of them is an error,
      unless the last name is `other`;
    * `class`: the classes; added at the end if it is not there.

    `NAME=ITEM` names the level; by default it is `groupsN`, `depthN`, `named`. Without items there are
    `default_levels(len(wnids))`. A finer level keeps the cuts of the coarser ones: `groups:50` after `groups:10`
    splits those 10 further.

    Labels are named by the lowest synset above all their classes (those of `named` as they are named), and
    "other X" where other groups were cut out below that synset X; "other" is what is left at the root.
    Words of two synsets are told apart by the parent's, then by the wnid. A class that is itself
    the ancestor of another class is a label of its own beside that other.

    Args:
        wnids: the classes; the order is that of the label ids.
        levels: items as above.
        table: another table of the same form.

    Raises:
        TaxonomyError: a wnid that the table does not know, or that occurs twice; an item that cannot
            be read, or that splits no group of the level above it.

    Example:
        >>> tree = taxonomy(["n02123045", "n01440764", "n02099601", "n04285008"], ["kind=named:animal+other", "groups:3"])
        >>> tree.names[:2]
        (('animal', 'other'), ('carnivore', 'tench', 'sports car'))
        >>> tree.names[2], tree.parents[2].tolist()
        (('tabby', 'tench', 'golden retriever', 'sports car'), [0, 1, 0, 2])
    """
    synsets = read_table(table)
    if not wnids:
        raise TaxonomyError("no wnids: a taxonomy needs at least one class")
    if repeated := [w for w, n in collections.Counter(wnids).items() if n > 1]:
        raise TaxonomyError(f"wnid '{repeated[0]}' is given twice")
    for wnid in wnids:
        if wnid not in synsets:
            raise TaxonomyError(
                f"WordNet's table does not know '{wnid}': it holds the 1,000 classes of ILSVRC-2012 and their ancestors; "
                "give a taxonomy file of your own (data.taxonomy), or make a larger table (third_party/wordnet/README.md)"
            )
    tree = _Tree(wnids, synsets)
    items = list(levels) or list(default_levels(len(wnids)))
    if items[-1].rpartition("=")[2] != CLASS:
        items.append(CLASS)
    names: dict[str, list[str]] = {}
    parents: dict[str, list[int]] = {}
    cuts = {tree.top}
    groups: list[int] = [0] * len(wnids)  # of each class
    count = 1
    for position, item in enumerate(items):
        name, spec = _parse(item)
        if name in names:
            raise TaxonomyError(f"two levels are called '{name}': name one of them, as in 'kind={spec}'")
        if spec == CLASS and position < len(items) - 1:
            raise TaxonomyError(f"level '{CLASS}' is the finest; '{items[position + 1]}' cannot follow it")
        cuts = tree.cut(cuts, spec)
        tops = [tree.nearest(wnid, cuts) for wnid in wnids] if spec != CLASS else list(wnids)
        order = {top: i for i, top in enumerate(dict.fromkeys(tops))}
        if spec != CLASS and len(order) <= count:
            above = f"the {count} of the level above it" if names else "one, which answers no question"
            raise TaxonomyError(
                f"level '{item}' has {len(order)} groups, no more than {above}: leave it out or order them anew"
            )
        if spec != CLASS and len(order) == len(wnids):
            raise TaxonomyError(f"level '{item}' has as many groups as there are classes, {len(wnids)}: leave it out")
        if names:
            parents[name] = [groups[tops.index(top)] for top in order]
        names[name] = tree.label(tops, as_cut=spec.startswith("named"))
        groups, count = [order[top] for top in tops], len(order)
    return Taxonomy.from_names(names, parents)


def default_levels(classes: int) -> tuple[str, ...]:
    """Levels for so many classes: each splits the groups above it into about equally many.

    Example:
        >>> default_levels(1000)
        ('groups:10', 'groups:100', 'class')
        >>> default_levels(2)
        ('class',)
    """
    coarse = max(2, round(classes ** (1 / 3)))
    fine = max(coarse + 1, round(classes ** (2 / 3)))
    return (*(f"groups:{n}" for n in (coarse, fine) if n < classes), CLASS)


def read_table(path: str | pathlib.Path | None = None) -> Mapping[str, Synset]:
    """wnid → Synset, of a table of `third_party/wordnet/make_table.py` (default: the one that comes with mgjax).

    Raises:
        TaxonomyError: no table, or a row that is not wnid, parent and lemmas.
    """
    return _read(pathlib.Path(path) if path is not None else table_path())


def table_path() -> pathlib.Path:
    """Where the table lies: in a checkout, or where installing the package put it.

    Raises:
        TaxonomyError: it lies nowhere.
    """
    package = pathlib.Path(__file__).resolve().parents[1]
    candidates = [package.parent / "third_party" / "wordnet" / TABLE]
    try:
        installed = importlib.metadata.files("mgjax") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    candidates += [pathlib.Path(f.locate()) for f in installed if f.name == TABLE]
    candidates.append(package.parent / "share" / "mgjax" / "wordnet" / TABLE)  # pip install --target
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise TaxonomyError(f"WordNet's table is in none of {[str(c.parent) for c in candidates]}: install mgjax again")


@functools.lru_cache(maxsize=4)
def _read(path: pathlib.Path) -> Mapping[str, Synset]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaxonomyError(f"'{path}' cannot be read as a table of synsets: {error}") from None
    synsets = {}
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if line.startswith("#") or fields[0] == "wnid":
            continue
        if len(fields) != 3 or not is_wnid(fields[0]) or not fields[2]:
            raise TaxonomyError(f"'{path}' line {number}: a row is wnid, parent's wnid and lemmas, with tabs between them")
        synsets[fields[0]] = Synset(fields[1], tuple(fields[2].split(",")))
    for wnid, synset in synsets.items():
        if synset.parent and synset.parent not in synsets:
            raise TaxonomyError(f"'{path}': '{wnid}' is an orphan: its parent '{synset.parent}' is not in the table")
    return synsets


def _parse(item: str) -> tuple[str, str]:
    """`NAME=SPEC` or `SPEC` → (name of the level, spec)."""
    name, _, spec = item.rpartition("=")
    kind, _, argument = spec.partition(":")
    number = kind in ("groups", "depth") and argument.isdecimal()
    if not (spec == CLASS or number or (kind == "named" and argument)):
        raise TaxonomyError(f"WordNet knows no level '{item}': an item is groups:N, depth:N, named:A+B or class, or NAME=ITEM")
    return name or (kind + argument if number else kind), spec


class _Tree:
    """The part of WordNet above some classes."""

    def __init__(self, wnids: Sequence[str], synsets: Mapping[str, Synset]):
        self.wnids, self.synsets = list(wnids), synsets
        self.paths: dict[str, list[str]] = {}  # wnid → wnids from the root down to it
        for wnid in wnids:
            chain = [wnid]
            while above := synsets[chain[-1]].parent:
                if above in chain:
                    raise TaxonomyError(f"a cycle: '{above}' is its own ancestor")
                chain.append(above)
            chain.reverse()
            for depth, node in enumerate(chain):
                self.paths.setdefault(node, chain[: depth + 1])
        if len({path[0] for path in self.paths.values()}) > 1:
            raise TaxonomyError("the classes have no common root in the table")
        self.below: dict[str, set[int]] = {node: set() for node in self.paths}  # positions of the classes
        for i, wnid in enumerate(wnids):
            for node in self.paths[wnid]:
                self.below[node].add(i)
        self.top = self.paths[wnids[0]][0]

    def nearest(self, wnid: str, cuts: set[str]) -> str:
        """The lowest synset of `cuts` at or above a wnid."""
        return next(node for node in reversed(self.paths[wnid]) if node in cuts)

    def cut(self, cuts: set[str], spec: str) -> set[str]:
        """`cuts` and those of an item besides."""
        kind, _, argument = spec.partition(":")
        if kind == "groups":
            return self._even(cuts, int(argument))
        if kind == "depth":
            depth = int(argument)
            return cuts | {self.paths[w][min(depth, len(self.paths[w]) - 1)] for w in self.wnids}
        if kind == "named":
            return cuts | self._named(argument.split("+"))
        return cuts

    def _even(self, cuts: set[str], count: int) -> set[str]:
        """Cuts synsets out of the groups, each time the one that splits its group most evenly."""
        if count >= len(self.wnids):
            raise TaxonomyError(f"{count} groups cannot be made of {len(self.wnids)} classes: ask for fewer")
        groups: dict[str, list[str]] = {}
        for wnid in self.wnids:
            groups.setdefault(self.nearest(wnid, cuts), []).append(wnid)
        best = {top: self._best_split(top, members) for top, members in groups.items()}
        while len(groups) < count:
            top = min(best, key=best.get)
            node = best[top][-1]
            members = groups[top]
            groups[node] = [w for w in members if node in self.paths[w]]
            groups[top] = [w for w in members if node not in self.paths[w]]
            best |= {n: self._best_split(n, groups[n]) for n in (top, node)}
        return cuts | set(groups)

    def _best_split(self, top: str, members: Sequence[str]) -> tuple[int, int, str]:
        """(−a · b, depth, synset) of the synset that splits a group most evenly; least of all."""
        depth = len(self.paths[top])
        counts = collections.Counter(node for wnid in members for node in self.paths[wnid][depth:])
        rank = lambda node, a: (-a * (len(members) - a), len(self.paths[node]), node)
        return min((rank(node, a) for node, a in counts.items()), default=(0, 0, top))

    def _named(self, names: Sequence[str]) -> set[str]:
        """The synsets of lemmas or wnids; each class is below one of them, or `other` is among them."""
        rest = names[-1] == REST
        chosen = set()
        for name in names[:-1] if rest else names:
            word = name.replace(" ", "_")
            found = [w for w in self.paths if w == name or word in self.synsets[w].lemmas]
            if not found:
                raise TaxonomyError(f"'{name}' is no synset above these classes")
            if len(found) > 1:
                options = ", ".join(f"{w} ({', '.join(self.synsets[w].lemmas)})" for w in found)
                raise TaxonomyError(f"'{name}' is the word of several synsets; give the wnid: {options}")
            chosen |= set(found)
        lost = sorted(set(range(len(self.wnids))) - set().union(*(self.below[c] for c in chosen)))
        if lost and not rest:
            shown = ", ".join(self.synsets[self.wnids[i]].name for i in lost[:5])
            raise TaxonomyError(
                f"{len(lost)} classes are below none of '{'+'.join(names)}': {shown}{', …' if len(lost) > 5 else ''}; "
                f"name more, or add '+{REST}'"
            )
        return chosen

    def label(self, tops: Sequence[str], as_cut: bool) -> list[str]:
        """Unique names of the groups of classes that share their top, in order of appearance.

        Args:
            as_cut: a group is named by its top, not by the lowest synset above all its classes.
        """
        members = collections.defaultdict(list)
        for i, top in enumerate(tops):
            members[top].append(i)
        nodes, words = [], []
        for top, group in members.items():
            paths = [self.paths[self.wnids[i]] for i in group]
            shared = [level[0] for level in zip(*paths) if len(set(level)) == 1]
            node = top if as_cut else shared[-1]
            word = self.synsets[node].name
            if not self.below[node] <= set(group) and node != self.wnids[group[0]]:
                word = REST if top == self.top else f"{REST} {word}"
            nodes.append(node)
            words.append(word)
        for told_apart in (lambda n: self.synsets[self.synsets[n].parent].name, lambda n: n):
            repeated = {w for w, n in collections.Counter(words).items() if n > 1}
            words = [f"{w} ({told_apart(n)})" if w in repeated else w for n, w in zip(nodes, words)]
        return words
