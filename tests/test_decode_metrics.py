import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from mgjax import Batch, Head, Outputs, Task, Taxonomy
from mgjax.decode import METHODS, decode, task_log_probs
from mgjax.losses import multilabel_loss
from mgjax.metrics import BINS, ClassificationMetrics, MultiLabelMetrics
from tests.test_taxonomy import forests


def random_log_probs(tree, rng, batch=5, scale=3.0):
    make = lambda n: jax.nn.log_softmax(jnp.asarray(rng.normal(size=(batch, n)) * scale, jnp.float32))
    return {level: make(tree.size(level)) for level in tree.levels}


@settings(max_examples=40, deadline=None)
@given(forests(), st.integers(0, 1000))
def test_answers_are_paths_and_probabilities_add_up(edges, seed):
    tree = Taxonomy.from_edges(edges)
    said = random_log_probs(tree, np.random.default_rng(seed))
    for method in METHODS:
        path = decode(said, tree, method)
        for above, level in itertools.pairwise(tree.levels):
            np.testing.assert_array_equal(tree.lift(path.labels[level], level, above), path.labels[above])
            lifted = np.exp(path.log_probs[level]) @ tree.ancestor_matrix(level, above)
            np.testing.assert_allclose(lifted, np.exp(path.log_probs[above]), atol=1e-4)
        for level in tree.levels:
            np.testing.assert_allclose(np.exp(path.log_probs[level]).sum(-1), 1, atol=1e-4)


def test_combined_is_the_argmax_over_all_paths_by_brute_force(uneven, rng):
    """Each conditional is the geometric mean over the heads that see so deep; every leaf is tried."""
    said = {l: np.asarray(v, np.float64) for l, v in random_log_probs(uneven, rng).items()}
    path = decode(said, uneven)
    levels = uneven.levels
    for row in range(5):
        # P[h][level][node]: what head h says of a node at a level at or above its own.
        prob = {
            h: {l: np.exp(said[h][row]) @ uneven.ancestor_matrix(h, l) for l in levels[: i + 1]} for i, h in enumerate(levels)
        }
        leaf_prob = np.ones(len(uneven.paths))
        for depth, level in enumerate(levels):
            parent = uneven.parents[depth]
            pooled = np.ones(uneven.size(level))
            for h in levels[depth:]:
                above = prob[h][levels[depth - 1]][parent] if depth else 1.0
                pooled *= (prob[h][level] / above) ** (1 / len(levels[depth:]))
            for siblings in (np.flatnonzero(parent == p) for p in np.unique(parent)):
                pooled[siblings] /= pooled[siblings].sum()
            leaf_prob *= pooled[uneven.paths[:, depth]]
        np.testing.assert_allclose(np.exp(path.log_probs[levels[-1]][row]), leaf_prob, rtol=1e-3, atol=1e-6)
        assert path.labels[levels[-1]][row] == leaf_prob.argmax()


def test_product_is_the_argmax_over_all_paths_by_brute_force(uneven, rng):
    said = {l: np.asarray(v, np.float64) for l, v in random_log_probs(uneven, rng, 50).items()}
    path = decode(said, uneven, "product")
    leaf = np.exp(sum(said[l][:, uneven.paths[:, i]] for i, l in enumerate(uneven.levels)))
    for i, level in enumerate(uneven.levels):
        np.testing.assert_array_equal(path.labels[level], uneven.paths[leaf.argmax(1), i])
    leaf /= leaf.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(path.log_probs[uneven.levels[-1]]), leaf, rtol=1e-4, atol=1e-6)


def test_one_head_alone_is_left_as_it_is(uneven, rng):
    finest = uneven.levels[-1]
    said = {finest: random_log_probs(uneven, rng)[finest]}
    combined, product, lifted = (decode(said, uneven, m) for m in ("combined", "product", "lifted"))
    for path in (combined, product, lifted):
        np.testing.assert_allclose(path.log_probs[finest], said[finest], atol=1e-4)
    for level in uneven.levels:
        np.testing.assert_array_equal(combined.labels[level], lifted.labels[level])


def test_methods_differ_as_they_should():
    tree = Taxonomy.from_names({"s": ["a", "b"], "c": ["a1", "a2", "b1"]}, {"c": [0, 0, 1]})
    said = {"s": jnp.log(jnp.array([[0.6, 0.4]])), "c": jnp.log(jnp.array([[0.05, 0.05, 0.9]]))}
    label = {m: int(decode(said, tree, m).labels["s"][0]) for m in METHODS}
    assert label == {"combined": 1, "product": 1, "lifted": 1, "top_down": 0}
    with pytest.raises(ValueError, match="magic"):
        decode(said, tree, "magic")
    with pytest.raises(ValueError, match="nothing to decode"):
        decode({}, tree)


def test_only_coarse_levels_answered(uneven, rng):
    level = uneven.levels[0]
    path = decode({level: random_log_probs(uneven, rng)[level]}, uneven)
    assert set(path.labels) == {level}


def test_extreme_disagreement_stays_finite(uneven):
    sure = lambda n, i: jax.nn.log_softmax(jnp.where(jnp.arange(n) == i, 0.0, -1e4))[None]
    said = {l: sure(uneven.size(l), i) for l, i in zip(uneven.levels, (0, 3, 3))}
    path = decode(said, uneven)
    assert all(np.isfinite(v).all() for v in path.log_probs.values())


def test_heads_of_one_task_are_averaged():
    heads = [Head("t", {"a": "grad"}, "t_a"), Head("t", {"b": "grad"}, "t_b")]
    outputs = Outputs({"t_a": jnp.log(jnp.array([[0.9, 0.1]])), "t_b": jnp.log(jnp.array([[0.5, 0.5]]))})
    said = task_log_probs(outputs, heads, [Task("t", "t", 2), Task("u", "u", 2)])
    assert set(said) == {"t"}
    np.testing.assert_allclose(np.exp(said["t"]), [[0.7, 0.3]], rtol=1e-5)


# ---------------------------------------------------------------------- metrics


def setup_metrics(tree, logits, labels, mask=None):
    tasks = [Task(l, l, tree.size(l), l) for l in tree.levels]
    heads = [Head(l, {"g": "grad"}) for l in tree.levels]
    n = len(next(iter(labels.values())))
    mask = np.ones(n, bool) if mask is None else mask
    batch = Batch({}, {k: jnp.asarray(v) for k, v in labels.items()}, jnp.asarray(mask), jnp.arange(n))
    return ClassificationMetrics(tree, tasks, heads), Outputs(logits), batch


@pytest.fixture
def evaluated(uneven, rng):
    n = 200
    leaf = rng.integers(0, 5, n)
    labels = {l: uneven.paths[leaf, i] for i, l in enumerate(uneven.levels)}
    logits = {
        l: jnp.asarray(rng.normal(size=(n, uneven.size(l))) + 2 * np.eye(uneven.size(l))[labels[l]], jnp.float32)
        for l in uneven.levels
    }
    return uneven, logits, labels


def test_figures_agree_with_scikit_learn(evaluated):
    tree, logits, labels = evaluated
    metrics, outputs, batch = setup_metrics(tree, logits, labels)
    figures = metrics.compute(jax.jit(metrics.update)(outputs, batch))
    path = decode(logits, tree)
    for level in tree.levels:
        got, y = figures["levels"][level], labels[level]
        for prefix, answer, probs in (
            ("", np.asarray(path.labels[level]), np.exp(path.log_probs[level])),
            ("raw_", np.asarray(logits[level]).argmax(-1), np.exp(jax.nn.log_softmax(logits[level]))),
        ):
            p, r, f, _ = precision_recall_fscore_support(y, answer, average="macro", zero_division=0)
            np.testing.assert_allclose(
                [got[prefix + k] for k in ("accuracy", "precision", "recall", "f1")],
                [(y == answer).mean(), p, r, f],
                rtol=1e-5,
            )
            confidence = probs[np.arange(len(y)), answer]
            bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
            ece = sum(
                abs((y == answer)[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
                for b in np.unique(bins)
            )
            np.testing.assert_allclose(got[prefix + "ece"], ece, atol=1e-5)
        if tree.size(level) > 5:
            top5 = top_k_accuracy_score(y, np.exp(path.log_probs[level]), k=5)
            np.testing.assert_allclose(got["top5"], top5, rtol=1e-5)


def test_path_figures_by_hand(evaluated):
    tree, logits, labels = evaluated
    metrics, outputs, batch = setup_metrics(tree, logits, labels)
    figures = metrics.compute(metrics.update(outputs, batch))
    finest = tree.levels[-1]
    answer, truth = np.asarray(decode(logits, tree).labels[finest]), labels[finest]
    raw = {l: np.asarray(v).argmax(-1) for l, v in logits.items()}
    disagree = [any(tree.lift(raw[b][i], b, a) != raw[a][i] for a, b in itertools.pairwise(tree.levels)) for i in range(200)]
    assert figures["full_path_accuracy"] == pytest.approx((answer == truth).mean())
    assert figures["raw_inconsistency"] == pytest.approx(np.mean(disagree)) and np.mean(disagree) > 0
    assert figures["inconsistency"] == 0
    assert figures["tree_distance"] == pytest.approx(tree.distance(answer, truth).mean())
    wrong = answer != truth
    depth = tree.lca_depth(answer[wrong], truth[wrong])
    height = [tree.root_height if d == 0 else tree.heights[d - 1][tree.paths[t, d - 1]] for d, t in zip(depth, truth[wrong])]
    assert figures["mistake_severity"] == pytest.approx(np.mean(height))
    for method in METHODS:
        answer = np.asarray(decode(logits, tree, method).labels[finest])
        assert figures["decoders"][method]["full_path_accuracy"] == pytest.approx((answer == truth).mean())
        chosen = dataclasses.replace(metrics, decoder=method)
        own = chosen.compute(chosen.update(outputs, batch))
        assert own["decoder"] == method and own["decoders"] == figures["decoders"]
        assert own["full_path_accuracy"] == own["levels"][finest]["accuracy"] == pytest.approx((answer == truth).mean())
        assert own["tree_distance"] == pytest.approx(tree.distance(answer, truth).mean())


def test_padding_and_splitting_change_nothing(evaluated):
    tree, logits, labels = evaluated
    whole = setup_metrics(tree, logits, labels)
    expected = whole[0].compute(whole[0].update(*whole[1:]))
    cut = lambda tree_, a, b: jax.tree.map(lambda x: jnp.asarray(x)[a:b], tree_)
    first = setup_metrics(tree, cut(logits, 0, 120), cut(labels, 0, 120))
    padded = jax.tree.map(
        lambda x: jnp.concatenate([x[120:], jnp.full_like(x[:40], 1)]), jax.tree.map(jnp.asarray, (logits, labels))
    )
    second = setup_metrics(tree, *padded, mask=np.arange(120) < 80)
    sums = jax.tree.map(jnp.add, first[0].update(*first[1:]), second[0].update(*second[1:]))
    got = whole[0].compute(sums)
    assert got.pop("decoder") == expected.pop("decoder")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_unknown_labels_count_for_nothing(evaluated):
    tree, logits, labels = evaluated
    partly = {l: np.where(np.arange(200) < 50, v, -1) for l, v in labels.items()} | {tree.levels[0]: labels[tree.levels[0]]}
    metrics, outputs, batch = setup_metrics(tree, logits, partly)
    got = metrics.compute(metrics.update(outputs, batch))
    cut = jax.tree.map(lambda x: x[:50], logits), {l: v[:50] for l, v in labels.items()}
    fewer = setup_metrics(tree, *cut)
    expected = fewer[0].compute(fewer[0].update(*fewer[1:]))
    assert got["levels"][tree.levels[2]] == pytest.approx(expected["levels"][tree.levels[2]], rel=1e-5)
    assert got["tree_distance"] == pytest.approx(expected["tree_distance"])
    assert got["examples"] == 200


def test_no_example_is_an_error(evaluated):
    metrics, outputs, batch = setup_metrics(*evaluated, mask=np.zeros(200, bool))
    with pytest.raises(ValueError, match="no example"):
        metrics.compute(metrics.update(outputs, batch))


def test_heads_that_share_a_task_are_reported_each(evaluated):
    tree, logits, labels = evaluated
    level = tree.levels[0]
    heads = [Head(level, {"g": "grad"}, "one"), Head(level, {"h": "grad"}, "two")]
    tasks = [Task(level, level, tree.size(level), level)]
    outputs = Outputs({"one": logits[level], "two": -logits[level]})
    batch = Batch({}, {level: jnp.asarray(labels[level])}, jnp.ones(200, bool), jnp.arange(200))
    metrics = ClassificationMetrics(tree, tasks, heads)
    figures = metrics.compute(metrics.update(outputs, batch))
    right = np.asarray(logits[level]).argmax(-1) == labels[level]
    assert figures["heads"]["one"]["accuracy"] == pytest.approx(right.mean())
    assert figures["heads"]["two"]["accuracy"] < right.mean()


def labelled(rng, n=400, classes=5):
    """Answers of two heads and the labels of n examples, of which each may have any number; the last label never occurs."""
    truth = (rng.random((n, classes)) < 0.3).astype(np.float32) * (np.arange(classes) < classes - 1)
    said = {h: jnp.asarray(rng.normal(size=(n, classes)) + 1.5 * truth - 0.7, jnp.float32) for h in ("a", "b")}
    task = Task("tags", "tags", classes, kind="multilabel")
    return MultiLabelMetrics([task], [Head("tags", {"g": "grad"}, h) for h in ("a", "b")]), said, truth


def test_figures_of_several_labels_are_scikit_learns(rng):
    metrics, said, truth = labelled(rng)
    share = np.mean([1 / (1 + np.exp(-np.asarray(z, np.float64))) for z in said.values()], 0)
    mask = np.arange(len(truth)) < 350
    sums = {}
    for rows in (slice(0, 100), slice(100, 400)):  # batches add up
        batch = Batch({}, {"tags": jnp.asarray(truth[rows])}, jnp.asarray(mask[rows]), jnp.arange(400)[rows])
        part = jax.jit(metrics.update)(Outputs({h: z[rows] for h, z in said.items()}), batch)
        sums = jax.tree.map(jnp.add, sums, part) if sums else part
    figures = metrics.compute(sums)["tasks"]["tags"]
    truth, share = truth[:350], share[:350]
    answer = share >= 0.5
    assert figures["f1_micro"] == pytest.approx(f1_score(truth, answer, average="micro"))
    occurs = (truth + answer).sum(0) > 0
    assert figures["f1_macro"] == pytest.approx(np.mean(f1_score(truth, answer, average=None, zero_division=0)[occurs]))
    assert figures["exact"] == pytest.approx(accuracy_score(truth, answer))
    expected = np.mean([average_precision_score(truth[:, c], share[:, c]) for c in range(4)])
    assert figures["map"] == pytest.approx(expected, abs=0.01)  # of a histogram
    assert metrics.names == ("tags/f1_micro", "tags/f1_macro", "tags/exact", "tags/map") and metrics.main == "tags/map"


def test_labels_that_are_not_known_count_for_nothing(rng):
    metrics, said, truth = labelled(rng)
    unknown = truth.copy()
    unknown[::2], unknown[1, 0] = np.nan, np.nan
    logits = said["a"].at[::2].set(np.nan)
    loss, known = multilabel_loss(logits, jnp.asarray(unknown))
    assert known.tolist() == [i % 2 == 1 for i in range(400)] and float(loss[0]) == 0
    z, y = np.asarray(said["a"][1, 1:], np.float64), truth[1, 1:]
    assert float(loss[1]) == pytest.approx(np.mean(np.log1p(np.exp(z)) - y * z), rel=1e-5)
    grad = jax.grad(lambda z: multilabel_loss(z, jnp.asarray(unknown))[0].sum())(logits)
    assert jnp.isfinite(grad).all() and (grad[::2] == 0).all()
    every = jnp.ones(400, bool)
    some = metrics.update(Outputs(said), Batch({}, {"tags": jnp.asarray(unknown)}, every, jnp.arange(400)))
    rest = Batch({}, {"tags": jnp.asarray(truth[3::2])}, every[3::2], jnp.arange(199))
    odd = metrics.update(Outputs({h: z[3::2] for h, z in said.items()}), rest)
    assert float(some["tasks"]["tags"]["count"]) == float(odd["tasks"]["tags"]["count"]) == 199
