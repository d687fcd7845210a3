import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgjax.taxonomy import Taxonomy, TaxonomyError


@st.composite
def forests(draw):
    """Edges of a random forest; node i hangs below an earlier node or is a root."""
    n = draw(st.integers(2, 14))
    parents = [None] + [draw(st.one_of(st.none(), st.integers(0, i - 1))) for i in range(1, n)]
    return [(None if p is None else f"n{p}", f"n{i}") for i, p in enumerate(parents)]


@settings(max_examples=200, deadline=None)
@given(forests())
def test_random_forests(edges):
    tree = Taxonomy.from_edges(edges)
    leaves = np.arange(tree.size(tree.levels[-1]))
    a, b, c = (x.ravel() for x in np.meshgrid(leaves, leaves, leaves))
    assert (tree.distance(leaves, leaves) == 0).all()
    assert (tree.distance(a, b) == tree.distance(b, a)).all()
    assert (tree.distance(a, b)[a != b] > 0).all()
    assert (tree.distance(a, c) <= tree.distance(a, b) + tree.distance(b, c)).all()
    for fine, mid, coarse in itertools.combinations(reversed(tree.levels), 3):
        every = np.arange(tree.size(fine))
        assert (tree.lift(tree.lift(every, fine, mid), mid, coarse) == tree.lift(every, fine, coarse)).all()
        product = tree.ancestor_matrix(fine, mid) @ tree.ancestor_matrix(mid, coarse)
        assert (product == tree.ancestor_matrix(fine, coarse)).all()
    assert Taxonomy.from_json(tree.to_json()) == tree


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
