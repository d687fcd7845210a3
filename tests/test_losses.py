import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgjax import Batch, Head, Outputs, Task
from mgjax.granularity import DeclarationError
from mgjax.losses import cross_entropy
from mgjax.objective import Objective

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
