"""Taxonomies in files: `.csv`, `.json`, `.nwk`. What is written reads back with the same fingerprint.

* `.csv`, levels: the header names the levels, coarse to fine; one row per leaf holds its label at each level, with
  empty cells below a leaf that ends early. Labels take their ids in order of appearance. A row that ends at a label
  with further rows below it is no leaf: it only fixes the order.
* `.csv`, edges: the header is `parent,child`; an empty parent declares a root (once one is declared, all must be). The
  levels are `level_0`, `level_1`, …; a single root above everything is left out.
* `.json`: `{"names": {level: [...]}, "parents": {level: [...]}}` as `Taxonomy.to_json` gives it, or nested objects,
  `{"animal": {"dog": ["poodle"], "cat": null}}`.
* `.nwk`, `.newick`: one Newick tree. Its root is the implicit common root, whatever its label. Labels may stand in
  quotes ('it''s'); underscores stay; branch lengths and comments count for nothing, but for the first comment
  that `write_taxonomy` makes, which holds names of levels and an order of labels that Newick cannot express.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence

from mgjax.taxonomy.core import Taxonomy, TaxonomyError

EDGES = ("parent", "child")


def read_taxonomy(path: str | os.PathLike) -> Taxonomy:
    """Reads a taxonomy in the format of the file's suffix.

    Raises:
        TaxonomyError: no such file, an unknown suffix, bytes that are not UTF-8, or a text that describes no forest;
            with the file and, where it can be said, the line.
    """
    path = pathlib.Path(path).expanduser()
    suffix = _suffix(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaxonomyError(f"taxonomy '{path}' cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaxonomyError(f"'{path}' line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save it as UTF-8") from None
    return from_text(text, suffix, str(path))


def write_taxonomy(taxonomy: Taxonomy, path: str | os.PathLike) -> None:
    """Writes a taxonomy in the format of the file's suffix, whole or not at all.

    Raises:
        TaxonomyError: an unknown suffix, a name that the format cannot hold, a folder that cannot be written to.
    """
    path = pathlib.Path(path).expanduser()
    try:
        data = to_text(taxonomy, _suffix(path)).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaxonomyError(f"'{path}': a name cannot be written as UTF-8: {error.object[:40]!r}") from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TaxonomyError(f"taxonomy '{path}' cannot be written: {error.strerror}") from None


def from_text(text: str, suffix: str, where: str = "text") -> Taxonomy:
    """Reads a taxonomy from a text in the format of a suffix; `where` stands in the messages.

    Example:
        >>> from_text("((cat,dog)animal,car);", ".nwk").names
        (('animal', 'car'), ('cat', 'dog', 'car'))
        >>> from_text("kind,name\\nanimal,cat\\nanimal,dog\\ncar,\\n", ".csv").names
        (('animal', 'car'), ('cat', 'dog', 'car'))
    """
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise TaxonomyError(f"'{where}' is empty")
    try:
        return _FORMATS[suffix][0](text, where)
    except TaxonomyError as error:
        raise error if str(error).startswith(f"'{where}'") else TaxonomyError(f"'{where}': {error}") from None
    except RecursionError:
        raise TaxonomyError(f"'{where}' is nested too deeply") from None


def to_text(taxonomy: Taxonomy, suffix: str) -> str:
    """The taxonomy as a text in the format of a suffix; `from_text` is the inverse."""
    return _FORMATS[suffix][1](taxonomy)


def _suffix(path: pathlib.Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise TaxonomyError(f"'{path}' is of no known format: a taxonomy file ends in {', '.join(_FORMATS)}")
    return suffix


# ---------------------------------------------------------------------- csv


def _read_csv(text: str, where: str) -> Taxonomy:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise TaxonomyError(f"'{where}' line {reader.line_num}: {error}") from None
    (first, header), *rows = rows
    if "" in header:
        raise TaxonomyError(f"'{where}' line {first}: column {header.index('') + 1} has no name; the header names the levels")
    if len(set(header)) < len(header):
        raise TaxonomyError(f"'{where}' line {first}: two columns have one name: {', '.join(header)}")
    for line, row in rows:
        if len(row) != len(header):
            raise TaxonomyError(f"'{where}' line {line}: {len(row)} cells, but the header has {len(header)}")
    if not rows:
        raise TaxonomyError(f"'{where}' has a header, but no rows")
    return _from_edge_rows(rows, where) if tuple(header) == EDGES else _from_leaf_rows(header, rows, where)


def _from_edge_rows(rows: Sequence[tuple[int, list[str]]], where: str) -> Taxonomy:
    line_of: dict[str, int] = {}
    parent_of: dict[str, str] = {}
    for line, (parent, child) in rows:
        if not child:
            raise TaxonomyError(f"'{where}' line {line}: no child is named")
        if child in parent_of:
            if parent_of[child] == parent:
                raise TaxonomyError(
                    f"'{where}' line {line}: '{child}' is given twice below '{parent}', first in line {line_of[child]}"
                )
            raise TaxonomyError(
                f"'{where}' line {line}: '{child}' has a second parent: '{parent}', "
                f"and '{parent_of[child]}' in line {line_of[child]}"
            )
        parent_of[child], line_of[child] = parent, line
    declared = "" in parent_of.values()
    for line, (parent, child) in rows:
        if declared and parent and parent not in parent_of:
            raise TaxonomyError(
                f"'{where}' line {line}: '{parent}' is an orphan: it has children, but no parent; "
                f"declare it as a root with the row ',{parent}', or give it a parent"
            )
        seen, above = {child}, parent
        while above:
            if above in seen:
                raise TaxonomyError(f"'{where}' line {line}: a cycle: '{above}' is its own ancestor")
            seen.add(above)
            above = parent_of.get(above, "")
    return Taxonomy.from_edges((parent or None, child) for _, (parent, child) in rows)


def _from_leaf_rows(header: list[str], rows: Sequence[tuple[int, list[str]]], where: str) -> Taxonomy:
    labels: list[dict[str, tuple[str | None, int]]] = [{} for _ in header]  # name → (parent, line)
    ended: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        depth = next((i for i, name in enumerate(row) if not name), len(row))
        if depth == 0:
            raise TaxonomyError(
                f"'{where}' line {line}: '{next(filter(None, row), '')}' is an orphan: the coarsest label is missing"
            )
        if any(row[depth:]):
            below = next(filter(None, row[depth:]))
            raise TaxonomyError(
                f"'{where}' line {line}: '{below}' is an orphan: its label at level '{header[depth]}' is missing"
            )
        path = tuple(row[:depth])
        if path in ended:
            raise TaxonomyError(f"'{where}' line {line}: '{' / '.join(path)}' stands in line {ended[path]} already")
        ended[path] = line
        for level, (parent, name) in enumerate(zip((None, *path), path)):
            known, at = labels[level].setdefault(name, (parent, line))
            if known != parent:
                raise TaxonomyError(
                    f"'{where}' line {line}: '{name}' of level '{header[level]}' has a second parent: "
                    f"'{parent}', and '{known}' in line {at}"
                )
    if not labels[-1]:
        raise TaxonomyError(f"'{where}': no row has a label at level '{header[-1]}': leave the column out")
    below_first = list(zip(header, labels))[1:]
    return Taxonomy.from_names(
        {level: list(own) for level, own in zip(header, labels)},
        {level: [parent for parent, _ in own.values()] for level, own in below_first},
    )


def _write_csv(taxonomy: Taxonomy) -> str:
    if taxonomy.levels == EDGES:
        raise TaxonomyError("a .csv whose levels are 'parent' and 'child' would be read as edges: rename them or write .json")
    own = [[n for n, repeat in zip(*both) if not repeat] for both in zip(taxonomy.names, taxonomy.inherited)]
    if "" in taxonomy.levels or any("" in names for names in own):
        raise TaxonomyError("a .csv cannot hold a level or label without a name: write .json")
    width = len(taxonomy.levels)
    rows = [taxonomy.path_names(leaf) for leaf in range(len(taxonomy.names[-1]))]
    appear = [list(dict.fromkeys(row[i] for row in rows if len(row) > i)) for i in range(width)]
    if appear != own:  # rows of inner labels come first, level by level, and fix the order
        inner = []
        for depth, level in enumerate(taxonomy.levels[:-1]):
            finer = taxonomy.levels[depth + 1]
            parents = set(taxonomy.ancestors(finer, level)[~taxonomy.inherited[depth + 1]].tolist())
            paths = [taxonomy.ancestors(level, above) for above in taxonomy.levels[: depth + 1]]
            for i in range(len(own[depth])):
                path = tuple(taxonomy.names[d][ids[i]] for d, ids in enumerate(paths))
                inner.append((path, i in parents))
        ends = {path for path, has_children in inner if not has_children}
        rows = [path for path, _ in inner] + [row for row in rows if row not in ends]
    rows = [list(taxonomy.levels), *([*row, *[""] * (width - len(row))] for row in rows)]
    returns = any("\r" in cell for row in rows for cell in row)  # which csv quotes on its own only from Python 3.13 on
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL).writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------- json


def _read_json(text: str, where: str) -> Taxonomy:
    def unique(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise TaxonomyError(f"'{where}': '{key}' is given twice in one object")
            seen.add(key)
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise TaxonomyError(f"'{where}' line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(data, dict):
        raise TaxonomyError(f"'{where}' holds a {type(data).__name__}; a taxonomy is an object")
    if set(data) != {"names", "parents"}:
        return Taxonomy.from_nested(_checked(data, where, ()))
    for key, of_parents in (("names", False), ("parents", True)):
        good = (str, int) if of_parents else (str,)
        for level, items in data[key].items() if isinstance(data[key], dict) else ((None, None),):
            if not isinstance(items, list) or not all(isinstance(i, good) and not isinstance(i, bool) for i in items):
                raise TaxonomyError(f"'{where}': '{key}' maps each level to a list; level '{level}' has {str(items)[:60]}")
    return Taxonomy.from_json(data)


def _checked(node: object, where: str, path: tuple[str, ...]) -> object:
    """A nested tree, or TaxonomyError for what is neither object, list of names nor null."""
    if isinstance(node, dict):
        for name, below in node.items():
            _checked(below, where, (*path, name))
    elif isinstance(node, list):
        if wrong := [n for n in node if not isinstance(n, str)]:
            raise TaxonomyError(f"'{where}': {wrong[0]!r} below '{' / '.join(path)}' is no name")
        if len(set(node)) < len(node):
            twice = next(n for n in node if node.count(n) > 1)
            raise TaxonomyError(f"'{where}': '{twice}' is given twice below '{' / '.join(path)}'")
    elif node is not None:
        raise TaxonomyError(f"'{where}': below '{' / '.join(path)}' stands {node!r}; an object, a list of names or null can")
    return node


def _write_json(taxonomy: Taxonomy) -> str:
    return json.dumps(taxonomy.to_json(), ensure_ascii=False, indent=1) + "\n"


# ---------------------------------------------------------------------- newick

_TOKEN = re.compile(r"\s+|(?P<comment>\[[^\]]*\])|(?P<quoted>'(?:[^']|'')*')|(?P<mark>[(),;:])|(?P<plain>[^\s()\[\]',;:]+)")
_NOTE = "[mgjax "


def _read_newick(text: str, where: str) -> Taxonomy:
    """Nodes are numbered in order of appearance; node 0 is the root."""

    def fail(at: int, message: str):
        line = text.count("\n", 0, at) + 1
        raise TaxonomyError(f"'{where}' line {line} column {at - text.rfind(chr(10), 0, at)}: {message}")

    parent: list[int] = [-1]
    label: list[str | None] = [None]
    place = [0]
    node, note, complete, before = 0, {}, False, ""
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        at, position = position, token.end() if token else position
        if token is None:
            fail(at, "a quote or comment that is never closed" if text[at] in "'[" else f"'{text[at]}' has no meaning here")
        kind, value = token.lastgroup, token.group()
        if kind == "comment" and value.startswith(_NOTE) and not note:
            note = _note(value, lambda message, at=at: fail(at, message))
        if kind in (None, "comment"):
            continue
        if complete:
            fail(at, "a second root: a Newick file holds one tree, which ends at ';' (put a common root above both)")
        if value == "(" and kind == "mark":
            if before not in ("", "(", ","):
                fail(at, "'(' comes after a label: a comma is missing")
            parent.append(node)
            label.append(None)
            place.append(at + 1)
            node = len(parent) - 1
        elif value in (",", ")") and kind == "mark":
            if node == 0:
                fail(
                    at, "a second root: everything stands within one pair of parentheses" if value == "," else "')' without '('"
                )
            if label[node] is None:
                fail(place[node], "a label without a name: every leaf and group needs one")
            above = parent[node]
            if value == ",":
                parent.append(above)
                label.append(None)
                place.append(at + 1)
                node = len(parent) - 1
            else:
                node = above
        elif value == ";" and kind == "mark":
            if node != 0:
                fail(at, f"parentheses are not balanced: {_depth(parent, node)} '(' are not closed")
            complete = True
        elif value == ":" and kind == "mark":
            if before == ":":
                fail(at, "two colons")
        elif before == ":":
            try:
                float(value)
            except ValueError:
                fail(at, f"'{value}' is no branch length")
            kind = "length"
        elif before not in ("", "(", ",", ")"):
            fail(at, f"{value} comes after a label: a comma is missing, or quotes around the name")
        else:
            label[node], place[node] = value[1:-1].replace("''", "'") if kind == "quoted" else value, at
        before = value if kind == "mark" else kind
    if not complete:
        fail(
            len(text), f"parentheses are not balanced: {_depth(parent, node)} '(' are not closed" if node else "';' is missing"
        )
    return _from_nodes(parent, label, note, lambda i, message: fail(place[i], message))


def _depth(parent: list[int], node: int) -> int:
    return sum(1 for _ in itertools.takewhile(lambda n: n, _upwards(parent, node)))


def _upwards(parent: list[int], node: int):
    while node >= 0:
        yield node
        node = parent[node]


def _note(comment: str, fail) -> dict:
    """{"levels": names, "order": {depth: permutation}} of the comment that `_write_newick` makes."""
    try:
        note = json.loads(comment[len(_NOTE) : -1])
        order = {int(depth): [int(i) for i in ids.split()] for depth, ids in note["order"].items()}
        levels = [note["levels"][str(i)] for i in range(len(note["levels"]))]
    except (ValueError, KeyError, TypeError, AttributeError):
        fail("the comment of mgjax is damaged: delete it, and levels are called level_0, level_1, …")
    return {"levels": levels, "order": order}


def _from_nodes(parent: list[int], label: list[str | None], note: dict, fail) -> Taxonomy:
    children: dict[int, list[int]] = {}
    siblings = set()
    for node, above in enumerate(parent[1:], 1):
        if (above, label[node]) in siblings:
            fail(node, f"'{label[node]}' is given twice below one parent")
        siblings.add((above, label[node]))
        children.setdefault(above, []).append(node)
    if not children:
        fail(0, "a tree of one label: put the labels in parentheses")
    by_level, orders = [], note.get("order", {})
    above = [0]
    while below := [c for n in above for c in children.get(n, [])]:
        order = orders.get(len(by_level), range(len(below)))
        if sorted(order) != list(range(len(below))):
            fail(0, "the comment of mgjax does not fit the tree: delete it")
        by_level.append([below[i] for i in order])
        above = by_level[-1]
    levels = note.get("levels") or [f"level_{i}" for i in range(len(by_level))]
    if len(levels) != len(by_level):
        fail(0, f"the tree has {len(by_level)} levels, the comment of mgjax names {len(levels)}: delete it")
    at = [{node: i for i, node in enumerate(nodes)} for nodes in by_level]
    return Taxonomy.from_names(
        {level: [label[n] for n in nodes] for level, nodes in zip(levels, by_level)},
        {levels[i]: [at[i - 1][parent[n]] for n in by_level[i]] for i in range(1, len(levels))},
    )


def _write_newick(taxonomy: Taxonomy) -> str:
    own = [(~flags).nonzero()[0].tolist() for flags in taxonomy.inherited]
    children: dict[tuple[int, int], list[int]] = {}
    for depth, labels in enumerate(own):
        for i in labels:
            children.setdefault((depth - 1, int(taxonomy.parents[depth][i])), []).append(i)

    def text(depth: int, i: int) -> str:
        below = children.get((depth, i), [])
        inside = f"({','.join(text(depth + 1, c) for c in below)})" if below else ""
        return inside + ("'" + taxonomy.names[depth][i].replace("'", "''") + "'" if depth >= 0 else "")

    # A reader meets the labels of a level parent by parent; another order of ids is noted.
    order = {}
    above = [-1]
    for depth, labels in enumerate(own):
        met = [c for n in above for c in children.get((depth - 1, n), [])]
        if met != labels:
            order[depth] = " ".join(str(met.index(i)) for i in labels)
        above = labels
    # A comment of Newick ends at the first bracket: objects and strings alone, brackets escaped.
    note = json.dumps({"levels": dict(enumerate(taxonomy.levels)), "order": order})
    escaped = note.replace("[", "\\u005b").replace("]", "\\u005d")
    return f"{text(-1, -1)}{_NOTE}{escaped}];\n"


_FORMATS = {
    ".csv": (_read_csv, _write_csv),
    ".json": (_read_json, _write_json),
    ".nwk": (_read_newick, _write_newick),
    ".newick": (_read_newick, _write_newick),
}
