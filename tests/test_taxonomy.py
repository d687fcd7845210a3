import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgjax.decode import METHODS, decode
from mgjax.taxonomy import Taxonomy, TaxonomyError, read_taxonomy, write_taxonomy
from mgjax.taxonomy.files import from_text, to_text
from mgjax.taxonomy.induced import from_confusion, from_weights


def forest(code):
    """Edges of a forest from integers; node i hangs below an earlier node or is a root."""
    parents = [None] + [None if c % (i + 1) == i else c % (i + 1) for i, c in enumerate(code, 1)]
    return [(None if p is None else f"n{p}", f"n{i}") for i, p in enumerate(parents)]


def forests(largest=14):
    return st.lists(st.integers(0, 5039), min_size=1, max_size=largest - 1).map(forest)


def check_lifts(tree):
    for fine, mid, coarse in itertools.combinations(reversed(tree.levels), 3):
        every = np.arange(tree.size(fine))
        np.testing.assert_array_equal(tree.lift(tree.lift(every, fine, mid), mid, coarse), tree.lift(every, fine, coarse))


def check_metric(tree):
    leaves = np.arange(tree.size(tree.levels[-1]))
    table = tree.distance(leaves[:, None], leaves[None])
    assert (np.diag(table) == 0).all() and (table + np.eye(len(leaves)) > 0).all()
    assert (table == table.T).all()
    assert (table[:, None] <= table[:, :, None] + table[None]).all()  # over all triples


def check_files(tree):
    for suffix in (".csv", ".json", ".nwk"):
        again = from_text(to_text(tree, suffix), suffix)
        assert again.fingerprint == tree.fingerprint
        assert again.levels == tree.levels and again.names == tree.names
        assert all((a == b).all() for a, b in zip(again.parents, tree.parents))


def reordered(tree, seed):
    """The same forest with the labels of every level in another order."""
    rng, data, above = np.random.default_rng(seed), tree.to_json(), None
    names, parents = {}, {}
    for depth, level in enumerate(tree.levels):
        order = rng.permutation(len(data["names"][level]))
        names[level] = [data["names"][level][i] for i in order]
        if depth:
            parents[level] = [above[data["parents"][level][i]] for i in order]
        above = {old: new for new, old in enumerate(order.tolist())}
        # Leaves that ended above follow in the order of their level.
        if depth + 1 < len(tree.levels):
            own = Taxonomy.from_names({l: names[l] for l in tree.levels[: depth + 1]}, parents).names[-1]
            above = {old: own.index(name) for old, name in enumerate(tree.names[depth])}
    return Taxonomy.from_names(names, parents)


def moved(tree, level, label, parent):
    data = tree.to_json()
    data["parents"][level] = [parent if i == label else p for i, p in enumerate(data["parents"][level])]
    return Taxonomy.from_json(data)


def check_fingerprint(tree, moves):
    for level, label, parent in moves:
        same = tree.parents[tree.index(level)][label] == parent
        assert (moved(tree, level, label, parent).fingerprint == tree.fingerprint) == same
        data = tree.to_json()
        data["names"][level][label] += "'"
        assert Taxonomy.from_json(data).fingerprint != tree.fingerprint


def all_moves(tree):
    for depth, level in enumerate(tree.levels[1:], 1):
        open_parents = np.flatnonzero(~tree.inherited[depth - 1])
        yield from itertools.product([level], np.flatnonzero(~tree.inherited[depth]).tolist(), open_parents.tolist())


@settings(max_examples=10_000, deadline=None)
@given(forests(10), st.integers(0, 999))
def test_ten_thousand_forests(edges, pick):
    """What holds of every taxonomy: lifts compose, distance is a metric, files keep all, every edge counts."""
    tree = Taxonomy.from_edges(edges)
    check_lifts(tree)
    check_metric(tree)
    check_files(reordered(tree, pick))
    moves = list(all_moves(tree))
    check_fingerprint(tree, [moves[pick % len(moves)]] if moves else [])


@settings(max_examples=100, deadline=None)
@given(forests())
def test_every_edge_and_name_changes_the_fingerprint(edges):
    tree = Taxonomy.from_edges(edges)
    check_fingerprint(tree, all_moves(tree))


SIZES = (3, 6, 9)  # of the levels: one shape, so that JAX compiles each operation once


def forest_of_shape(code):
    """A forest whose levels have `SIZES` labels, the repeats of leaves that end early included."""
    names, parents, open_, above = {"a": ["a0", "a1", "a2"]}, {}, 3, 3
    for level, size in zip("bc", SIZES[1:]):
        hang = [c % open_ for c in code]
        own = next(n for n in range(size, 0, -1) if n + above - len(set(hang[:n])) <= size)
        names[level], parents[level] = [f"{level}{i}" for i in range(own)], hang[:own]
        code, open_, above = code[own:], own, size
    tree = Taxonomy.from_names(names, parents)
    assert tuple(map(tree.size, tree.levels)) == SIZES
    return tree


# MGJAX_FORESTS=10000 decodes as many, in some minutes.
@settings(max_examples=int(os.environ.get("MGJAX_FORESTS", 400)), deadline=None)
@given(
    st.lists(st.integers(0, 59), min_size=15, max_size=15).map(forest_of_shape),
    st.sampled_from([(0, 1, 2), (0, 2), (2,), (1,), (0, 1)]),
    st.integers(0, 99),
)
def test_decoding_random_forests_gives_paths_and_probabilities(tree, answered, seed):
    rng = np.random.default_rng(seed)
    shares = {tree.levels[i]: rng.dirichlet(np.ones(SIZES[i]), 4) + 1e-6 for i in answered}
    said = {level: np.log(p / p.sum(1, keepdims=True)).astype(np.float32) for level, p in shares.items()}
    for method in METHODS:
        path = decode(said, tree, method)
        marginals = {level: np.exp(p) for level, p in path.log_probs.items()}
        for p in marginals.values():
            np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
        for coarse, fine in itertools.pairwise(path.labels):
            np.testing.assert_array_equal(tree.lift(path.labels[fine], fine, coarse), path.labels[coarse])
            np.testing.assert_allclose(marginals[fine] @ tree.ancestor_matrix(fine, coarse), marginals[coarse], atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(forests())
def test_ancestor_matrices_multiply(edges):
    tree = Taxonomy.from_edges(edges)
    for fine, mid, coarse in itertools.combinations(reversed(tree.levels), 3):
        product = tree.ancestor_matrix(fine, mid) @ tree.ancestor_matrix(mid, coarse)
        np.testing.assert_array_equal(product, tree.ancestor_matrix(fine, coarse))


def reference_distance(edges, x, y):
    """Edges on the way between two names, by walking up, the implicit root above all."""
    parent = {child: p for p, child in edges}

    def up(n):
        chain = [n]
        while parent[chain[-1]] is not None:
            chain.append(parent[chain[-1]])
        return [*chain, "ROOT"]

    a, b = up(x), up(y)
    lca = next(n for n in a if n in b)
    return a.index(lca) + b.index(lca)


@settings(max_examples=100, deadline=None)
@given(forests())
def test_distance_is_that_of_the_drawn_tree(edges):
    if sum(p is None for p, _ in edges) == 1:  # a single root is left out
        edges = [*edges, (None, "other")]
    tree = Taxonomy.from_edges(edges)
    names = tree.names[-1]
    for i, j in itertools.product(range(len(names)), repeat=2):
        assert tree.distance(i, j) == reference_distance(edges, names[i], names[j])


def test_uneven_depth(uneven):
    assert uneven.levels == ("level_0", "level_1", "level_2")
    assert uneven.names[2] == ("poodle", "spaniel", "cat", "car", "plant")
    assert uneven.paths.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 2], [1, 2, 3], [2, 3, 4]]
    assert uneven.leaf_depth.tolist() == [3, 3, 2, 2, 1]
    assert uneven.path_names(2) == ("animal", "cat")
    assert [h.tolist() for h in uneven.heights] == [[2, 1, 0], [0, 1, 0, 0], [0] * 5]
    assert uneven.root_height == 3
    assert uneven.distance(0, 1) == 2 and uneven.distance(0, 2) == 3 and uneven.distance(0, 4) == 4


def test_all_constructors_agree():
    names = Taxonomy.from_names({"a": ["x", "y"], "b": ["x1", "x2", "y1"]}, {"b": ["x", "x", "y"]})
    by_index = Taxonomy.from_names({"a": ["x", "y"], "b": ["x1", "x2", "y1"]}, {"b": [0, 0, 1]})
    nested = Taxonomy.from_nested({"x": ["x1", "x2"], "y": ["y1"]}, ["a", "b"])
    edges = Taxonomy.from_edges([("x", "x1"), ("x", "x2"), ("y", "y1")], ["a", "b"])

    class Label:
        def __init__(self, names):
            self.names = names

    features = {"b": Label(["x1", "x2", "y1"]), "a": Label(["x", "y"]), "image": object()}
    seen = {"a": np.array([0, 1, 0, -1]), "b": np.array([1, 2, 0, 1])}
    observed = Taxonomy.from_features(features, labels=seen)
    assert names == by_index == nested == edges == observed
    assert len({t.fingerprint for t in (names, by_index, nested, edges, observed)}) == 1


def test_a_single_root_is_left_out():
    assert Taxonomy.from_edges([(None, "all"), ("all", "a"), ("all", "b")]).names == (("a", "b"),)


def test_label_ids_do_not_depend_on_hashing():
    tree = Taxonomy.from_edges([("a", "b")], roots=["a", "z", "m", "k", "b0"])
    assert tree.names[0] == ("a", "z", "m", "k", "b0")


def test_labels_are_lifted_and_unknown_stays_unknown(uneven):
    assert uneven.lift([4, -1, 0], "level_2", "level_0").tolist() == [2, -1, 0]
    assert uneven.ancestor_matrix("level_2", "level_1").sum() == 5
    assert uneven.upto("level_1").names == uneven.names[:2]


def test_fingerprint_changes_with_names_levels_and_edges():
    make = lambda names, parents, level="b": Taxonomy.from_names({"a": ["x", "y"], level: names}, {level: parents})
    base = make(["p", "q", "r"], [0, 0, 1])
    others = [make(["p", "q", "s"], [0, 0, 1]), make(["p", "q", "r"], [0, 1, 1]), make(["p", "q", "r"], [0, 0, 1], "c")]
    assert len({t.fingerprint for t in [base, *others]}) == 4


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: Taxonomy.from_edges([("a", "b"), ("b", "a")]), "cycle"),
        (lambda: Taxonomy.from_edges([(None, "r"), ("r", "x"), ("a", "b"), ("b", "a")]), "cycle"),
        (lambda: Taxonomy.from_edges([("a", "c"), ("b", "c")]), "second parent: 'a' and 'b'"),
        (lambda: Taxonomy.from_edges([("a", "c"), ("a", "c")]), "twice"),
        (lambda: Taxonomy.from_edges([("a", "b")], roots=["z"]), "'a' is an orphan"),
        (lambda: Taxonomy.from_edges([(None, "r"), ("a", "b")]), "'a' is an orphan"),
        (lambda: Taxonomy.from_nested({"a": ["x"], "b": ["x"]}), "second parent"),
        (lambda: Taxonomy.from_edges([("a", "b"), ("z", "c")], ["one"]), "2 levels, but 1 names"),
        (lambda: Taxonomy.from_names({"a": ["x", "x"]}), "duplicate names"),
        (lambda: Taxonomy.from_names({"a": ["x"], "b": ["y"]}), "1 labels and 0 parents"),
        (lambda: Taxonomy.from_names({"a": ["x"], "b": ["y"]}, {"b": ["z"]}), "'y' of level 'b' is an orphan"),
        (lambda: Taxonomy.from_names({"a": ["x"], "b": ["y"]}, {"b": [3]}), "orphan"),
        (lambda: Taxonomy.from_names({"a": []}), "no labels"),
        (lambda: Taxonomy.from_names({}), "at least one level"),
        (lambda: Taxonomy.from_edges([]), "at least one label"),
    ],
)
def test_what_is_no_forest_is_refused(build, says):
    with pytest.raises(TaxonomyError, match=says):
        build()


def test_labels_outside_the_taxonomy_are_refused(uneven):
    with pytest.raises(TaxonomyError, match="label 7 at position 1.*level_0.*3 labels"):
        uneven.lift([0, 7], "level_0", "level_0")
    with pytest.raises(TaxonomyError, match="no level 'genus'"):
        uneven.size("genus")
    with pytest.raises(TaxonomyError, match="finer"):
        uneven.ancestors("level_0", "level_2")


def test_observed_parents_must_be_unique_and_complete():
    class Label:
        def __init__(self, *names):
            self.names = names

    features = {"super": Label("s", "t"), "label": Label("a", "b", "c")}
    with pytest.raises(TaxonomyError, match="'a' has a second parent"):
        Taxonomy.from_features(features, labels={"super": np.array([0, 1, 0, 1]), "label": np.array([0, 0, 1, 2])})
    with pytest.raises(TaxonomyError, match="no example shows 'c'"):
        Taxonomy.from_features(features, labels={"super": np.array([0, 1]), "label": np.array([0, 1])})
    with pytest.raises(TaxonomyError, match="is a ClassLabel"):
        Taxonomy.from_features({"image": object()})


def test_some_levels_can_be_selected(uneven):
    some = uneven.select(["level_0", "level_2"])
    assert some.names == (uneven.names[0], uneven.names[2])
    assert some.paths.tolist() == [[0, 0], [0, 1], [0, 2], [1, 3], [2, 4]]
    assert some.leaf_depth.tolist() == [2, 2, 2, 2, 1]  # cat and car end at level_1, which is left out
    assert uneven.select(uneven.levels) == uneven and uneven.select(["level_2"]).leaf_depth.tolist() == [1] * 5
    for levels, says in [
        (["level_1"], "cannot be left out"),
        (["level_2", "level_0"], "coarse to fine"),
        (["x"], "no level 'x'"),
    ]:
        with pytest.raises(TaxonomyError, match=says):
            uneven.select(levels)


@settings(max_examples=300, deadline=None)
@given(forests(), st.integers(0, 10**6))
def test_selected_levels_are_a_taxonomy_with_the_same_lifts(edges, pick):
    tree = Taxonomy.from_edges(edges)
    some = tree.select([l for i, l in enumerate(tree.levels[:-1]) if pick >> i & 1] + [tree.levels[-1]])
    assert Taxonomy.from_json(some.to_json()) == some and Taxonomy.from_json(some.to_json()).names == some.names
    for coarse, fine in itertools.pairwise(some.levels):
        np.testing.assert_array_equal(some.ancestors(fine, coarse), tree.ancestors(fine, coarse))


# ---------------------------------------------------------------------- files


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=7, max_size=7, unique=True),
    st.integers(0, 99),
)
def test_files_keep_strange_names(names, pick):
    *labels, level = names
    levels = [level, level + "'[]", level + "2"]
    parents = {levels[1]: [1, 0, 1], levels[2]: [2]}
    tree = Taxonomy.from_names(dict(zip(levels, (labels[:2], labels[2:5], labels[5:]))), parents)
    check_files(reordered(tree, pick))


@pytest.mark.parametrize("suffix", [".csv", ".json", ".nwk", ".newick", ".CSV"])
def test_a_file_is_written_whole_and_reads_back(uneven, tmp_path, suffix):
    path = tmp_path / f"tree{suffix}"
    write_taxonomy(uneven.upto("level_1"), path)
    write_taxonomy(uneven, path)
    assert read_taxonomy(path) == uneven and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written_leaves_the_old_one(uneven, tmp_path, monkeypatch):
    path = tmp_path / "tree.csv"
    write_taxonomy(uneven, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TaxonomyError, match="cannot be written: No space left"):
        write_taxonomy(uneven.upto("level_0"), path)
    assert read_taxonomy(path) == uneven and [p.name for p in tmp_path.iterdir()] == ["tree.csv"]
    for folder in ("missing", "tree.csv"):
        with pytest.raises(TaxonomyError, match="cannot be written"):
            write_taxonomy(uneven, tmp_path / folder / "tree.csv")


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    for tree, says in [
        (Taxonomy.from_names({"a": ["", "x"]}), "without a name"),
        (Taxonomy.from_names({"parent": ["x"], "child": ["y"]}, {"child": ["x"]}), "read as edges"),
        (Taxonomy.from_names({"a": ["\ud800"]}), "cannot be written as UTF-8"),
    ]:
        with pytest.raises(TaxonomyError, match=says):
            write_taxonomy(tree, tmp_path / "tree.csv")


def test_formats_that_people_write_by_hand(uneven):
    nested = '{"animal": {"cat": null, "dog": ["poodle", "spaniel"]}, "vehicle": ["car"], "plant": null}'
    assert from_text(nested, ".json") == uneven
    edges = "parent,child\n,animal\nanimal,cat\nanimal,dog\ndog,poodle\ndog,spaniel\n,vehicle\nvehicle,car\n,plant\n"
    assert from_text(edges, ".csv") == uneven
    newick = "((cat:1.5,(poodle,'spaniel':2e-3)dog)animal:0.1,\n (car)vehicle,[ a comment ] plant)life;\n"
    assert from_text(newick, ".nwk") == uneven
    rows = "level_0,level_1,level_2\r\nanimal,cat,\r\nanimal,dog,poodle\r\nanimal,dog,spaniel\r\nvehicle,car,\r\nplant,,\r\n"
    assert from_text("\ufeff" + rows, ".csv") == uneven
    assert from_text("((x_1,x_2)'it''s');", ".nwk").names == (("it's",), ("x_1", "x_2"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        # csv: edges
        ("t.csv", "parent,child\na,b\nb,c\nc,a\n", r"line 2: a cycle: 'b' is its own ancestor"),
        ("t.csv", "parent,child\nroot,a\nx,b\nb,x\n", r"line 3: a cycle"),
        ("t.csv", "parent,child\n,a\na,b\nc,d\n", r"line 4: 'c' is an orphan.*declare it as a root with the row ',c'"),
        ("t.csv", "parent,child\na,b\na,b\n", r"line 3: 'b' is given twice below 'a', first in line 2"),
        ("t.csv", "parent,child\na,b\nz,b\n", r"line 3: 'b' has a second parent: 'z', and 'a' in line 2"),
        ("t.csv", "parent,child\na,\n", r"line 2: no child"),
        # csv: leaves
        ("t.csv", "", "is empty"),
        ("t.csv", "s,c\n", "header, but no rows"),
        ("t.csv", "s,c\na,x\na\n", r"line 3: 1 cells, but the header has 2"),
        ("t.csv", "s,c\na,x\nb,x\n", r"line 3: 'x' of level 'c' has a second parent: 'b', and 'a' in line 2"),
        ("t.csv", "s,c\na,x\na,x\n", r"line 3: 'a / x' stands in line 2 already"),
        ("t.csv", "s,c\n,x\n", r"line 2: 'x' is an orphan"),
        ("t.csv", "s,c,d\na,,x\n", r"line 2: 'x' is an orphan: its label at level 'c' is missing"),
        ("t.csv", "s,c\na,\n", r"no row has a label at level 'c'"),
        ("t.csv", "s,\na,x\n", r"line 1: column 2 has no name"),
        ("t.csv", "s,s\na,x\n", r"line 1: two columns have one name"),
        ("t.csv", 's,c\na,"x\n', r"line \d: unexpected end"),
        ("t.csv", b"s,c\na,x\nb,caf\xe9\n", r"t.csv' line 3: byte 0xe9 is not UTF-8"),
        ("t.json", b'{"a": ["caf\xe9"]}', r"t.json' line 1: byte 0xe9 is not UTF-8"),
        ("t.nwk", b"(a,\ncaf\xe9);", r"t.nwk' line 2: byte 0xe9 is not UTF-8"),
        # json
        ("t.json", '{"a": ["x"],\n "b": ', r"line 2 column 7"),
        ("t.json", '["a"]', "holds a list"),
        ("t.json", '{"a": {"x": 3}}', r"below 'a / x' stands 3"),
        ("t.json", '{"a": [3]}', r"3 below 'a' is no name"),
        ("t.json", '{"a": ["x", "x"]}', r"'x' is given twice below 'a'"),
        ("t.json", '{"a": ["x"], "a": ["y"]}', r"'a' is given twice in one object"),
        ("t.json", '{"a": ["x"], "b": ["x"]}', r"t.json': 'x' has a second parent: 'a' and 'b'"),
        ("t.json", '{"a": {"b": {"a": null}}}', r"'a' stands at the top and below 'b' too"),  # a cycle
        ("t.json", '{"names": {"s": ["a"], "c": ["x"]}, "parents": {"c": [4]}}', r"'x' of level 'c' is an orphan"),
        ("t.json", '{"names": {"s": "a"}, "parents": {}}', r"'names' maps each level to a list; level 's' has a"),
        ("t.json", '{"names": 3, "parents": {}}', r"'names' maps each level to a list"),
        ("t.json", "[" * 100_000, "nested too deeply"),
        # newick
        ("t.nwk", "(a,b);\n(c,d);", r"line 2 column 1: a second root"),
        ("t.nwk", "(a,b),c;", r"line 1 column 6: a second root"),
        ("t.nwk", "((a,b)c;", r"line 1 column 8: parentheses are not balanced: 1 '\(' are not closed"),
        ("t.nwk", "(a,b))c;", r"line 1 column 6: '\)' without '\('"),
        ("t.nwk", "((a,b)c", r"parentheses are not balanced"),
        ("t.nwk", "(a,b)", r"';' is missing"),
        ("t.nwk", "((a,a)c,d);", r"line 1 column 5: 'a' is given twice below one parent"),
        ("t.nwk", "((a,b),c);", r"line 1 column 2: a label without a name"),
        ("t.nwk", "(a,,b);", r"line 1 column 4: a label without a name"),
        ("t.nwk", "(a b);", r"line 1 column 4: b comes after a label"),
        ("t.nwk", "(a(b));", r"line 1 column 3: '\(' comes after a label"),
        ("t.nwk", "(a:x,b);", r"'x' is no branch length"),
        ("t.nwk", "(a::1,b);", r"two colons"),
        ("t.nwk", "(a,'b);", r"line 1 column 4: a quote or comment that is never closed"),
        ("t.nwk", "(a,b);]", r"line 1 column 7: '\]' has no meaning"),
        ("t.nwk", "a;", "a tree of one label"),
        ("t.nwk", "((x)a,(x)b);", r"t.nwk': level 'level_1' has duplicate names: \['x'\]"),
        ("t.nwk", "(a,b)[mgjax {}];", "comment of mgjax is damaged"),
        ("t.nwk", '(a,b)[mgjax {"levels": {"0": "x", "1": "y"}, "order": {}}];', "names 2: delete it"),
        ("t.nwk", '(a,b)[mgjax {"levels": {"0": "x"}, "order": {"0": "0 0"}}];', "does not fit"),
        ("t.txt", "a", "of no known format: a taxonomy file ends in .csv, .json"),
        ("t.nwk", None, "cannot be read: No such file"),
    ],
)
def test_files_that_hold_no_forest_are_refused(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaxonomyError, match=says) as caught:
        read_taxonomy(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------- induced

CLASSES = ["cat", "car", "dog", "bus", "wolf", "oak"]
WEIGHTS = np.array([[5, 0.5, 0], [0, 3, 0.1], [4, 0.4, 0.4], [0, 9, 0.2], [1, 0, 0.3], [0.1, 0, 2]])


@pytest.mark.parametrize("linkage", ["ward", "average"])
def test_weights_induce_nested_levels(linkage):
    tree = from_weights(WEIGHTS, CLASSES, (2, 3), linkage=linkage)
    assert tree.levels == ("groups2", "groups3", "class") and tree.names[2] == tuple(CLASSES)
    assert tree.names[1] == ("cat / dog / wolf", "car / bus", "oak")
    assert tree.lift(np.arange(6), "class", "groups3").tolist() == [0, 1, 0, 1, 0, 2]
    # The length of a vector says nothing; the direction does.
    scaled = WEIGHTS * np.array([1, 1e200, 3, 1e-200, 7, 1])[:, None]
    assert from_weights(scaled, CLASSES, (2, 3), linkage=linkage) == tree


def test_confusion_induces_levels():
    counts = np.diag([90.0, 50, 90, 80, 10, 30])
    counts[0, 2] = counts[2, 4] = counts[3, 1] = 9
    tree = from_confusion(counts, CLASSES, (3,), levels=("kind", "species"))
    assert tree.levels == ("kind", "species") and tree.names[0] == ("cat / dog / wolf", "car / bus", "oak")
    scaled = counts * np.array([1, 100, 1, 0.5, 3, 1])[:, None]  # frequencies of the classes
    assert from_confusion(scaled, CLASSES, (3,), levels=("kind", "species")) == tree


def test_induction_is_deterministic_with_ties():
    names = [f"c{i}" for i in range(9)]
    equal = [from_weights(np.eye(9), names, (2, 4)) for _ in range(2)]
    assert equal[0] == equal[1] and [equal[0].size(l) for l in equal[0].levels] == [2, 4, 9]
    never = from_confusion(np.eye(9), names, (2, 4))
    assert [never.size(l) for l in never.levels] == [2, 4, 9]
    alike = from_weights([[1, 0], [0, 1], [0.1, 1]], ["a / b", "a", "b"], [2])
    assert alike.names[0] == ("a / b (group 1)", "a / b (group 2)")
    twins = from_weights(np.ones((9, 2)), names, (3,))
    assert twins.size("groups3") == 3 and twins.names[0][0].startswith("c0")


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 12), st.integers(0, 999))
def test_induced_levels_nest(classes, seed):
    rng = np.random.default_rng(seed)
    counts = sorted(set(rng.integers(2, classes, 2).tolist()))
    names = [f"c{i}" for i in range(classes)]
    for tree in (
        from_weights(rng.normal(size=(classes, 4)), names, counts),
        from_confusion(rng.integers(0, 4, (classes, classes)) + np.eye(classes), names, counts),
    ):
        assert [tree.size(l) for l in tree.levels] == [*counts, classes] and tree.names[-1] == tuple(names)
        check_lifts(tree)


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: from_weights(np.ones(3), CLASSES, [2]), r"\[classes, features\], not of shape \(3,\)"),
        (lambda: from_weights(np.ones((3, 2)), CLASSES, [2]), "6 names of classes for 3 vectors"),
        (lambda: from_weights(np.ones((2, 2)), ["a", "a"], [2]), "two classes are called 'a'"),
        (lambda: from_weights(np.ones((1, 2)), ["a"], []), "cannot be clustered"),
        (lambda: from_weights(WEIGHTS * [[1], [1], [0], [1], [1], [1]], CLASSES, [2]), "'dog' has a weight vector of zeros"),
        (lambda: from_weights(np.where(np.eye(6)[:, 1:2], np.nan, WEIGHTS), CLASSES, [2]), "'car' has a .* not finite"),
        (lambda: from_weights(WEIGHTS, CLASSES, [2], linkage="single"), "no linkage 'single'"),
        (lambda: from_weights(WEIGHTS, CLASSES, [6]), r"between 1 and 6 classes; got \[6\]"),
        (lambda: from_weights(WEIGHTS, CLASSES, [1]), r"between 1 and 6 classes"),
        (lambda: from_weights(WEIGHTS, CLASSES, [4, 2]), r"grow from level to level"),
        (lambda: from_weights(WEIGHTS, CLASSES, [2], levels=["a"]), "2 names of levels are needed"),
        (lambda: from_weights(WEIGHTS, CLASSES, [2], levels=["a", "a"]), "two levels have one name"),
        (lambda: from_confusion(np.ones((3, 2)), CLASSES[:3], [2]), r"not of shape \(3, 2\)"),
        (lambda: from_confusion(-np.eye(3), CLASSES[:3], [2]), "'cat' has a negative count"),
        (lambda: from_confusion(np.diag([1, 0, 1]), CLASSES[:3], [2]), "'car' never occurred"),
        (lambda: from_confusion(np.full((3, 3), np.inf), CLASSES[:3], [2]), "not finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(build, says):
    with pytest.raises(TaxonomyError, match=says):
        build()
