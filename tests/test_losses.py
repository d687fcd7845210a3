import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from mgjax import Batch, Head, Outputs, Task, Taxonomy
from mgjax.decode import lift
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError
from mgjax.losses import classification_loss, cross_entropy, distillation, masked_mean, soft_targets, weighted_mean
from mgjax.objective import Objective
from tests.test_taxonomy import forests

LOGITS = jax.random.normal(jax.random.key(0), (6, 4))
LABELS = jnp.array([0, 1, 2, 3, -1, 2])
MASK = jnp.array([True, True, True, True, True, False])


def test_cross_entropy_by_hand():
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))[:4]
    hard = -log_p[np.arange(4), np.asarray(LABELS)[:4]]
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, MASK), hard.mean(), rtol=1e-5)
    smooth = 0.9 * hard - 0.1 * log_p.mean(-1)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, MASK, smoothing=0.1), smooth.mean(), rtol=1e-5)


def test_masked_rows_cannot_alter_the_loss_nor_get_a_gradient():
    spoiled = LOGITS.at[4:].set(1e4)
    np.testing.assert_array_equal(cross_entropy(spoiled, LABELS, MASK), cross_entropy(LOGITS, LABELS, MASK))
    grad = jax.grad(cross_entropy)(LOGITS, LABELS, MASK)
    assert (grad[4:] == 0).all() and np.abs(grad[:4]).max() > 0


def test_a_batch_without_any_label_contributes_exactly_nothing():
    value, grad = jax.value_and_grad(cross_entropy)(LOGITS, jnp.full(6, -1), MASK)
    assert value == 0 and (grad == 0).all()


def test_jit_bfloat16_and_vmap():
    exact = cross_entropy(LOGITS, LABELS, MASK)
    np.testing.assert_allclose(jax.jit(cross_entropy)(LOGITS, LABELS, MASK), exact, rtol=1e-6)
    rough = cross_entropy(LOGITS.astype(jnp.bfloat16), LABELS, MASK)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, rtol=0.02)
    stacked = jax.vmap(cross_entropy)(LOGITS[None], LABELS[None], MASK[None])
    np.testing.assert_allclose(stacked[0], exact, rtol=1e-6)


# ---------------------------------------------------------------------- mixed examples

PARTNER = jnp.array([1, -1, 0, 3, 2, 1])
SHARE = jnp.array([0.7, 0.4, 1.0, 0.25, 0.6, 0.5])


def test_mixed_labels_by_hand():
    """Row 1's partner, row 4 itself and all of row 5 count for nothing."""
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    pairs = [(0, 0, 0.7), (0, 1, 0.3), (1, 1, 0.4), (2, 2, 1.0), (3, 3, 0.25), (3, 3, 0.75), (4, 2, 0.4)]
    expected = sum(-w * log_p[row, label] for row, label, w in pairs) / sum(w for *_, w in pairs)
    mixed = {"partner": PARTNER, "share": SHARE}
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, MASK, **mixed), expected, rtol=1e-5)
    smooth = sum(-w * (0.9 * log_p[row, label] + 0.1 * log_p[row].mean()) for row, label, w in pairs) / sum(
        w for *_, w in pairs
    )
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, MASK, smoothing=0.1, **mixed), smooth, rtol=1e-5)
    # What nobody knows gets no gradient, nor does a masked row.
    spoiled = LOGITS.at[5].set(1e4)
    np.testing.assert_array_equal(cross_entropy(spoiled, LABELS, MASK, **mixed), cross_entropy(LOGITS, LABELS, MASK, **mixed))
    assert (jax.grad(cross_entropy)(LOGITS, LABELS, MASK, **mixed)[5] == 0).all()


def test_a_share_of_one_is_no_mixing():
    got = cross_entropy(LOGITS, LABELS, MASK, partner=PARTNER, share=jnp.ones(6))
    np.testing.assert_allclose(got, cross_entropy(LOGITS, LABELS, MASK), rtol=1e-6)


def test_mixing_that_knows_no_label_contributes_exactly_nothing():
    nothing = jnp.full(6, -1)
    loss = lambda logits: cross_entropy(logits, nothing, MASK, partner=nothing, share=SHARE)
    value, grad = jax.value_and_grad(loss)(LOGITS)
    assert value == 0 and (grad == 0).all()


TASKS = [Task("a", "a", 4), Task("b", "b", 4)]
HEADS = [Head("a", {"g": "grad"}, "a1"), Head("a", {"h": "grad"}, "a2"), Head("b", {"g": "grad"})]
BATCH = Batch({}, {"a": LABELS, "b": LABELS}, MASK, jnp.arange(6))


def test_objective_weighs_tasks_and_averages_heads():
    outputs = Outputs({"a1": LOGITS, "a2": 2 * LOGITS, "b": 3 * LOGITS})
    loss, seen = Objective(TASKS, HEADS, (("b", 0.5),))(outputs, BATCH)
    each = [float(cross_entropy(k * LOGITS, LABELS, MASK)) for k in (1, 2, 3)]
    np.testing.assert_allclose(loss, (each[0] + each[1]) / 2 + 0.5 * each[2], rtol=1e-6)
    right = (np.asarray(LOGITS).argmax(-1) == np.asarray(LABELS))[:4].mean()
    assert seen["accuracy/b"] == pytest.approx(right) and seen["loss"] == loss


def test_objective_of_a_mixed_batch():
    mixed = BATCH.replace(partner={"a": PARTNER, "b": LABELS}, share=SHARE)
    loss, seen = Objective(TASKS, HEADS, smoothing=0.1)(Outputs({"a1": LOGITS, "b": LOGITS}), mixed)
    each = [cross_entropy(LOGITS, LABELS, MASK, smoothing=0.1, partner=p, share=SHARE) for p in (PARTNER, LABELS)]
    np.testing.assert_allclose(loss, sum(each), rtol=1e-6)
    # The accuracy is that of the row's own label.
    right = (np.asarray(LOGITS).argmax(-1) == np.asarray(LABELS))[:4].mean()
    assert seen["accuracy/a1"] == pytest.approx(right)


def test_objective_counts_only_what_was_answered():
    loss, seen = Objective(TASKS, HEADS)(Outputs({"a2": LOGITS}), BATCH)
    np.testing.assert_allclose(loss, cross_entropy(LOGITS, LABELS, MASK), rtol=1e-6)
    assert "loss/b" not in seen


def test_weights_that_make_no_objective():
    with pytest.raises(DeclarationError, match="'c'"):
        Objective(TASKS, HEADS, (("c", 1.0),))
    with pytest.raises(DeclarationError, match="no loss weight"):
        Objective(TASKS, HEADS, (("a", 0.0), ("b", 0.0)))


# ---------------------------------------------------------------------- weighted means


def test_weighted_mean_is_numpys_average(rng):
    values, weights = rng.normal(size=(3, 5)), rng.uniform(size=(3, 5))
    got = weighted_mean(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(got, np.average(values, weights=weights), rtol=1e-5)
    mask = weights > 0.5
    np.testing.assert_allclose(masked_mean(jnp.asarray(values), jnp.asarray(mask)), values[mask].mean(), rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_weighs_nothing_has_no_influence(garbage):
    values, weights = jnp.array([1.0, 4.0, garbage, garbage]), jnp.array([1.0, 0.5, 0.0, 0.0])
    value, grad = jax.value_and_grad(weighted_mean)(values, weights)
    assert value == 2.0
    np.testing.assert_allclose(grad, [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    value, grad = jax.value_and_grad(weighted_mean)(values, jnp.zeros(4))
    assert value == 0 and (grad == 0).all()


def test_weights_are_relative_however_small():
    values = jnp.array([1.0, 3.0])
    np.testing.assert_allclose(weighted_mean(values, jnp.array([1e-6, 3e-6])), 2.5, rtol=1e-6)
    assert weighted_mean(values.astype(jnp.bfloat16), jnp.array([True, True])).dtype == jnp.float32


# ---------------------------------------------------------------------- tables of targets

TREE = Taxonomy.from_names({"s": ["a", "b"], "c": ["a1", "a2", "b1", "b2"]}, {"c": [0, 0, 1, 1]})
KINDS = [{}, {"smoothing": 0.2}, {"smoothing": 0.2, "follow": True}, {"beta": 5.0}]


@settings(max_examples=30, deadline=None)
@given(forests(), st.sampled_from(KINDS))
def test_targets_are_distributions_that_favour_the_label(edges, kind):
    tree = Taxonomy.from_edges(edges)
    for level in tree.levels:
        table = soft_targets(tree, level, **kind)
        assert table.dtype == np.float32 and table.shape == (tree.size(level),) * 2 and (table >= 0).all()
        np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
        assert (table.argmax(1) == np.arange(len(table))).all()


def test_plain_smoothing_is_that_of_the_loss():
    np.testing.assert_array_equal(soft_targets(TREE, "c"), np.eye(4))
    table = soft_targets(TREE, "c", smoothing=0.1)
    np.testing.assert_allclose(table, 0.9 * np.eye(4) + 0.025, rtol=1e-6)
    rows = jnp.arange(6) % 4
    of_table, _ = classification_loss(LOGITS, rows, table)
    of_number, _ = classification_loss(LOGITS, rows, 0.1)
    np.testing.assert_allclose(of_table, of_number, rtol=1e-5)


def test_smoothing_that_follows_an_uneven_taxonomy_by_hand(uneven):
    """Above the leaves poodle, spaniel, cat, car and plant stand two levels and the root: a third of ε each."""
    finest, names = uneven.levels[-1], uneven.names[-1]
    table = soft_targets(uneven, finest, smoothing=0.3, follow=True)
    expected = np.zeros((5, 5))
    root, top = [names], [("cat", "poodle", "spaniel"), ("car",), ("plant",)]
    middle = [("poodle", "spaniel"), ("cat",), ("car",), ("plant",)]
    for group in root + top + middle:
        ids = [names.index(n) for n in group]
        expected[np.ix_(ids, ids)] += 0.1 / len(ids)
    np.testing.assert_allclose(table, expected + 0.7 * np.eye(5), rtol=1e-5)
    # At the coarsest level there is the root alone above: plain smoothing.
    top = uneven.levels[0]
    np.testing.assert_allclose(soft_targets(uneven, top, smoothing=0.3, follow=True), soft_targets(uneven, top, smoothing=0.3))


def test_soft_labels_by_tree_distance_by_hand(uneven):
    """Heights: the root 3, animal 2, dog 1, the leaves 0, at whatever depth they lie."""
    names = uneven.names[-1]
    height = np.full((5, 5), 3.0)
    for group, h in ((("cat", "poodle", "spaniel"), 2), (("poodle", "spaniel"), 1), *(((n,), 0) for n in names)):
        ids = [names.index(n) for n in group]
        height[np.ix_(ids, ids)] = h
    q = np.exp(-4.0 * height / 3)
    np.testing.assert_allclose(soft_targets(uneven, uneven.levels[-1], beta=4.0), q / q.sum(1, keepdims=True), rtol=1e-5)
    # Cut above them, dog is a leaf, and its distance to cat half of the tree's height.
    middle = soft_targets(uneven, uneven.levels[1], beta=4.0)
    dog, cat, car = (uneven.names[1].index(n) for n in ("dog", "cat", "car"))
    np.testing.assert_allclose(middle[dog, [cat, car]] / middle[dog, dog], np.exp([-2.0, -4.0]), rtol=1e-5)


def test_soft_labels_harden_with_beta():
    sharp, soft = (soft_targets(TREE, "c", beta=b) for b in (200.0, 1e-6))
    np.testing.assert_allclose(sharp, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(soft, 0.25, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"beta": 2.0, "smoothing": 0.1}, "exclude each other"),
        ({"smoothing": 1.0}, r"\[0, 1\)"),
        ({"smoothing": np.nan}, r"\[0, 1\)"),
        ({"beta": 0.0}, "above 0"),
        ({"beta": np.inf}, "above 0"),
    ],
)
def test_targets_that_cannot_be(wrong, says):
    with pytest.raises(InputError, match=says):
        soft_targets(TREE, "c", **wrong)
    with pytest.raises(InputError, match="'z'"):
        soft_targets(TREE, "z")


# ---------------------------------------------------------------------- labels at any level


def by_hand(logits, label, ids_below):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return -np.log(p[label] if ids_below is None else p[ids_below].sum())


def test_labels_at_any_level_by_hand(uneven, rng):
    """A row each: its own label, one lifted from below, a marginal of the level above, of the top, and nothing."""
    top, middle, finest = uneven.levels
    logits = rng.normal(size=(5, uneven.size(middle))) * 3
    at = lambda level, name: uneven.names[uneven.index(level)].index(name)
    dog, spaniel, animal = at(middle, "dog"), at(finest, "spaniel"), at(top, "animal")
    labels = {
        top: jnp.array([animal, -1, animal, -1, -1]),
        middle: jnp.array([dog, -1, -1, -1, -1]),
        finest: jnp.array([-1, spaniel, -1, -1, -1]),
    }
    loss, known = jax.jit(lambda z, l: classification_loss(z, l, taxonomy=uneven, level=middle))(jnp.asarray(logits), labels)
    animals = [at(middle, "cat"), dog]
    expected = [by_hand(logits[0], dog, None), by_hand(logits[1], dog, None), by_hand(logits[2], None, animals), 0, 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(known, [True, True, True, False, False])

    # Of two coarser labels the finer one counts: dogs, and not animals.
    labels = {top: jnp.array([animal]), middle: jnp.array([dog]), finest: jnp.array([-1])}
    fine = rng.normal(size=(1, 5))
    loss, known = classification_loss(jnp.asarray(fine), labels, taxonomy=uneven, level=finest)
    dogs = [spaniel, at(finest, "poodle")]
    np.testing.assert_allclose(loss, [by_hand(fine[0], None, dogs)], rtol=1e-5)
    # Where that is unknown too, the animals, by their leaves.
    labels[middle] = jnp.array([-1])
    loss, known = classification_loss(jnp.asarray(fine), labels, taxonomy=uneven, level=finest)
    np.testing.assert_allclose(loss, [by_hand(fine[0], None, [*dogs, at(finest, "cat")])], rtol=1e-5)


def test_own_labels_are_smoothed_and_marginals_are_not():
    labels = {"s": jnp.array([0, 0]), "c": jnp.array([1, -1])}
    table = soft_targets(TREE, "c", smoothing=0.4, follow=True)
    loss, _ = classification_loss(LOGITS[:2], labels, table, taxonomy=TREE, level="c")
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))[:2]
    np.testing.assert_allclose(loss, [-(table[1] * log_p[0]).sum(), -np.log(np.exp(log_p[1, :2]).sum())], rtol=1e-5)


def test_a_marginal_is_the_loss_of_the_lifted_classifier(rng):
    """As if the probabilities were summed first and the classifier asked for the coarse label."""
    logits, coarse = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.array([0, 1, 1, 0, 1, 0])
    loss = lambda z: classification_loss(z, {"s": coarse, "c": jnp.full(6, -1)}, taxonomy=TREE, level="c")[0].sum()
    other = lambda z: -jnp.take_along_axis(lift(jax.nn.log_softmax(z), "c", "s", TREE), coarse[:, None], 1).sum()
    for a, b in zip(jax.value_and_grad(loss)(logits), jax.value_and_grad(other)(logits)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_marginal_of_classes_that_are_nearly_ruled_out_is_finite():
    logits, labels = jnp.array([[-500.0, -501.0, 500.0, 0.0]]), {"s": jnp.array([0])}
    loss = lambda z: classification_loss(z, labels, taxonomy=TREE, level="c")[0].sum()
    value, grad = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 1000 - np.log1p(np.exp(-1)), rtol=1e-5)
    np.testing.assert_allclose(grad, [[-1 / (1 + np.exp(-1)), -1 / (1 + np.e), 1, 0]], atol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_rows_without_a_label_have_no_gradient_whatever_they_say(garbage):
    logits = LOGITS.at[4:].set(garbage)
    value, grad = jax.value_and_grad(cross_entropy)(logits, LABELS, MASK)
    np.testing.assert_array_equal(value, cross_entropy(LOGITS, LABELS, MASK))
    assert np.isfinite(grad).all() and (grad[4:] == 0).all()
    nothing = {"s": jnp.full(6, -1), "c": jnp.full(6, -1)}
    total = lambda z: classification_loss(z, nothing, taxonomy=TREE, level="c")[0].sum()
    value, grad = jax.value_and_grad(total)(logits)
    assert value == 0 and (grad == 0).all()


def test_losses_in_bfloat16_are_float32():
    labels = {"s": jnp.array([0, 1, -1]), "c": jnp.array([1, -1, -1])}
    of = lambda z: classification_loss(z, labels, soft_targets(TREE, "c", beta=3.0), taxonomy=TREE, level="c")[0]
    rough = of(LOGITS[:3].astype(jnp.bfloat16))
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, of(LOGITS[:3]), rtol=0.02)


def test_classes_that_do_not_fit():
    with pytest.raises(InputError, match="4 classes, level 's' has 2"):
        classification_loss(LOGITS, {"s": LABELS}, taxonomy=TREE, level="s")
    with pytest.raises(InputError, match=r"4 classes, the table of targets has the shape \(2, 2\)"):
        classification_loss(LOGITS, LABELS, np.eye(2))


# ---------------------------------------------------------------------- distillation


def test_distillation_by_hand(rng):
    z, t, temperature = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), 2.5
    p, q = (scipy.special.softmax(x / temperature, -1) for x in (t, z))
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(-1)
    z, t = jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.float32)
    np.testing.assert_allclose(distillation(z, t, temperature), expected, rtol=1e-4)
    # Log probabilities teach what logits teach.
    np.testing.assert_allclose(distillation(z, jax.nn.log_softmax(t), temperature), expected, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(distillation)(z, t, temperature), expected, rtol=1e-4)
    assert distillation(z.astype(jnp.bfloat16), t).dtype == jnp.float32


def test_the_teacher_is_not_taught_and_the_student_is():
    student, teacher = jax.grad(lambda z, t: distillation(z, t, 3.0).sum(), (0, 1))(LOGITS, -LOGITS)
    assert (teacher == 0).all()
    said, taught = (jax.nn.softmax(x / 3) for x in (LOGITS, -LOGITS))
    np.testing.assert_allclose(student, 3 * (said - taught), rtol=1e-4, atol=1e-6)


def test_a_teacher_that_rules_classes_out():
    sure = jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0]]))
    value, grad = jax.value_and_grad(lambda z: distillation(z, sure, 1.0).sum())(jnp.zeros((1, 4)))
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.25, -0.25, 0.25, 0.25]], rtol=1e-6)


def test_lifted_probabilities_are_sums(uneven, rng):
    top, middle, finest = uneven.levels
    log_p = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 5)), jnp.float32))
    for level in uneven.levels:
        expected = np.exp(log_p) @ uneven.ancestor_matrix(finest, level)
        np.testing.assert_allclose(np.exp(lift(log_p, finest, level, uneven)), expected, rtol=1e-5)
    np.testing.assert_allclose(
        lift(lift(log_p, finest, middle, uneven), middle, top, uneven), lift(log_p, finest, top, uneven), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(InputError, match="finer"):
        lift(log_p, top, finest, uneven)
