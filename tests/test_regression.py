"""Regression: loss, head and metrics, alone and beside classification, up to a short training."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from mgjax import Batch, Granularity, Head, MultiGranularityModel, OperatingPoint, Outputs, Task
from mgjax.contracts import FeatureInfo, Features
from mgjax.data import ArraySource, eval_batches, train_batches
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError
from mgjax.heads import ClassificationHead, RegressionHead, head_of
from mgjax.losses import squared_error
from mgjax.metrics import ClassificationMetrics, Metrics, RegressionMetrics
from mgjax.objective import Objective
from mgjax.train import Feeds, LogConfig, Stage
from mgjax.train.guards import StopConfig, lower_is_better
from tests import toy

# ---------------------------------------------------------------------- loss


def test_squared_error_by_hand(rng):
    said, truth = rng.normal(size=(2, 4, 3))
    loss, known = squared_error(jnp.asarray(said), jnp.asarray(truth))
    np.testing.assert_allclose(loss, 0.5 * ((said - truth) ** 2).sum(-1), rtol=1e-5)
    assert known.all()
    alone, _ = squared_error(jnp.asarray(said[:, :1]), jnp.asarray(truth[:, 0]))
    np.testing.assert_allclose(alone, 0.5 * (said[:, 0] - truth[:, 0]) ** 2, rtol=1e-5)


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_unknown_numbers_count_for_nothing(unknown):
    said = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.nan]])
    truth = jnp.array([[0.0, unknown], [unknown, unknown], [2.0, unknown]])
    loss, known = jax.jit(squared_error)(said, truth)
    np.testing.assert_array_equal(loss, [0.5, 0.0, 4.5])
    np.testing.assert_array_equal(known, [True, False, True])
    grad = jax.grad(lambda z: squared_error(z, truth)[0].sum())(said)
    np.testing.assert_array_equal(grad, [[1, 0], [0, 0], [3, 0]])


def test_the_gradient_is_the_error_and_bfloat16_is_computed_in_float32(rng):
    said, truth = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda z: squared_error(z, truth)[0].sum())(said), said - truth, rtol=1e-6)
    rough, _ = squared_error(said.astype(jnp.bfloat16), truth)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, squared_error(said, truth)[0], rtol=0.05)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (3, 3), (4, 3, 1)])
def test_targets_of_another_size(shape):
    with pytest.raises(InputError, match="not of the same numbers"):
        squared_error(jnp.zeros((4, 3)), jnp.zeros(shape))


# ---------------------------------------------------------------------- head


def features(dtype=jnp.float32):
    draw = lambda seed, width: Features(jax.random.normal(jax.random.key(seed), (4, width), dtype))
    return {"coarse": draw(0, 3), "fine": draw(1, 5)}


def test_every_head_is_made_alike():
    for kind, head in (
        ("classification", ClassificationHead),
        ("multilabel", ClassificationHead),
        ("regression", RegressionHead),
    ):
        module = head_of(Task("t", "t", 6, kind=kind), 0.5)
        assert isinstance(module, head)
        variables = module.init(jax.random.key(0), features())
        assert module.apply(variables, features()).shape == (4, 6)
        train = lambda seed, m=module, v=variables: m.apply(v, features(), train=True, rngs={"dropout": jax.random.key(seed)})
        assert np.abs(train(0) - train(1)).max() > 1e-3


def test_a_regression_is_linear_in_all_that_is_read():
    head = RegressionHead(2)
    variables = head.init(jax.random.key(0), features())
    got = head.apply(variables, features())
    flat = flatten_dict(variables["params"], sep="/")
    assert sorted(v.shape for v in flat.values()) == [(2,), (3, 2), (5, 2)]
    jacobian = jax.jacobian(lambda g: head.apply(variables, g))(features())
    for source, width in (("coarse", 3), ("fine", 5)):
        kernel = next(v for v in flat.values() if v.shape == (width, 2))
        for row in range(4):
            np.testing.assert_allclose(jacobian[source].vector[row, :, row], kernel.T, rtol=1e-6)
    # It is the linear map that a classifier has.
    np.testing.assert_array_equal(got, ClassificationHead(2).apply(variables, features()))


def test_predictions_lie_about_a_center_and_within_bounds():
    plain = RegressionHead(2)
    variables = plain.init(jax.random.key(0), features())
    said = plain.apply(variables, features())
    head = head_of(Task("t", "t", 2, kind="regression", center=3.0, spread=4.0, bounds=(2.0, 5.0)))
    np.testing.assert_allclose(head.apply(variables, features(), train=True), 3 + 4 * said, rtol=1e-5)
    np.testing.assert_allclose(head.apply(variables, features()), np.clip(3 + 4 * said, 2, 5), rtol=1e-5)
    for wrong in ({"spread": 0.0}, {"bounds": (2.0, 2.0)}):
        with pytest.raises(DeclarationError, match="task 't'"):
            Task("t", "t", 2, kind="regression", **wrong)


def test_errors_count_in_units_of_the_spread():
    batch = Batch({}, {"t": jnp.array([8.0, -2.0])}, jnp.ones(2, bool), jnp.arange(2))
    task = Task("t", "t", 1, kind="regression", spread=5.0)
    loss, _ = Objective([task], [Head("t", {"g": "grad"})])(Outputs({"t": jnp.array([[3.0], [-2.0]])}), batch)
    assert float(loss) == pytest.approx(0.5 * (0.5 * 1.0 + 0.0))


def test_an_absent_source_cannot_alter_a_prediction():
    head, given = RegressionHead(2), features()
    variables = head.init(jax.random.key(0), given)
    present = {"fine": jnp.array([True, False, True, False])}
    clean = head.apply(variables, given, present)
    spoiled = given | {"fine": Features(given["fine"].vector.at[1::2].set(np.nan))}
    np.testing.assert_array_equal(head.apply(variables, spoiled, present), clean)


def test_predictions_are_float32_whatever_the_features_are():
    given = features(jnp.bfloat16)
    for head in (RegressionHead(2), RegressionHead(2, dtype=jnp.bfloat16)):
        variables = head.init(jax.random.key(0), given)
        got = jax.jit(head.apply)(variables, given)
        assert got.dtype == jnp.float32
        exact = RegressionHead(2).apply(variables, jax.tree.map(lambda x: x.astype(jnp.float32), given))
        np.testing.assert_allclose(got, exact, atol=0.05)


# ---------------------------------------------------------------------- metrics

TASKS = [Task("age", "age", 1, kind="regression"), Task("place", "xy", 2, kind="regression")]
HEADS_OF = [Head("age", {"g": "grad"}, "age_a"), Head("age", {"h": "grad"}, "age_b"), Head("place", {"g": "grad"})]


def evaluated(rng, n=200):
    """(outputs, batch), with unknown numbers, masked rows, and predictions that know something."""
    age, place = rng.normal(30, 10, n), rng.normal((2, 500), (1, 80), (n, 2))
    said = {
        "age_a": (age + rng.normal(0, 5, n))[:, None],
        "age_b": (age + rng.normal(0, 5, n))[:, None],
        "place": place + rng.normal(0, (0.5, 30), (n, 2)),
    }
    age[::7], place[::5, 1], place[::9] = np.nan, np.nan, np.nan
    mask = np.arange(n) % 11 > 0
    as_jax = lambda x: jnp.asarray(x, jnp.float32)
    batch = Batch({}, {"age": as_jax(age), "xy": as_jax(place)}, jnp.asarray(mask), jnp.arange(n))
    return Outputs(jax.tree.map(as_jax, said)), batch


def test_figures_agree_with_scikit_learn(rng):
    outputs, batch = evaluated(rng)
    metrics = RegressionMetrics(TASKS, HEADS_OF)
    figures = metrics.compute(jax.jit(metrics.update)(outputs, batch))
    mask = np.asarray(batch.mask)
    assert figures["examples"] == mask.sum() and list(figures["tasks"]) == ["age", "place"]

    truth = np.asarray(batch.targets["age"], np.float64)
    said = np.mean([outputs.logits["age_a"], outputs.logits["age_b"]], 0)[:, 0]
    known = mask & np.isfinite(truth)
    pair = truth[known], said[known]
    expected = {"rmse": root_mean_squared_error(*pair), "mae": mean_absolute_error(*pair), "r2": r2_score(*pair)}
    assert figures["tasks"]["age"] == pytest.approx(expected, rel=1e-4)

    # Of two numbers each varies about its own mean.
    truth, said = np.asarray(batch.targets["xy"], np.float64), np.asarray(outputs.logits["place"])
    errors, spread = [], 0.0
    for d in range(2):
        known = mask & np.isfinite(truth[:, d])
        errors.append((said - truth)[known, d])
        spread += ((truth[known, d] - truth[known, d].mean()) ** 2).sum()
    errors = np.concatenate(errors)
    expected = {
        "rmse": np.sqrt((errors**2).mean()),
        "mae": np.abs(errors).mean(),
        "r2": 1 - (errors**2).sum() / spread,
    }
    assert figures["tasks"]["place"] == pytest.approx(expected, rel=1e-3)


def test_r2_of_several_numbers_is_scikit_learns_weighted_by_variance(rng):
    truth = rng.normal((0, 5), (1, 2), (50, 2))
    said = truth + rng.normal(size=(50, 2))
    batch = Batch({}, {"xy": jnp.asarray(truth, jnp.float32)}, jnp.ones(50, bool), jnp.arange(50))
    metrics = RegressionMetrics(TASKS, HEADS_OF)
    figures = metrics.compute(metrics.update(Outputs({"place": jnp.asarray(said, jnp.float32)}), batch))
    assert list(figures["tasks"]) == ["place"]  # nobody answered for the age
    expected = r2_score(truth, said, multioutput="variance_weighted")
    assert figures["tasks"]["place"]["r2"] == pytest.approx(expected, rel=1e-4)


def test_padding_and_splitting_change_nothing(rng):
    outputs, batch = evaluated(rng)
    metrics = RegressionMetrics(TASKS, HEADS_OF)
    expected = metrics.compute(metrics.update(outputs, batch))
    first = jax.tree.map(lambda x: x[:120], (outputs, batch))
    padded = jax.tree.map(lambda x: jnp.concatenate([x[120:], jnp.full_like(x[:40], 1)]), (outputs, batch))
    second = padded[0], padded[1].replace(mask=padded[1].mask & (jnp.arange(120) < 80))
    got = metrics.compute(jax.tree.map(jnp.add, metrics.update(*first), metrics.update(*second)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, expected)


def test_masked_rows_may_hold_anything(rng):
    outputs, batch = evaluated(rng)
    metrics = RegressionMetrics(TASKS, HEADS_OF)
    expected = metrics.update(outputs, batch)
    spoil = lambda x: jnp.where(batch.mask[:, None], x.reshape(200, -1), np.nan).reshape(x.shape)
    spoiled = Outputs(jax.tree.map(spoil, outputs.logits)), batch.replace(targets=jax.tree.map(spoil, batch.targets))
    jax.tree.map(np.testing.assert_array_equal, metrics.update(*spoiled), expected)


@pytest.mark.parametrize("mean", [2000.0, -50000.0])
def test_a_center_makes_r2_precise_far_from_zero(rng, mean):
    truth = rng.normal(mean, 1, (40, 64)).astype(np.float32)
    said = truth + rng.normal(0, 0.5, truth.shape).astype(np.float32)

    def figures(**how):
        metrics = RegressionMetrics(TASKS[:1], HEADS_OF, **how)
        update = jax.jit(metrics.update)
        sums = [
            update(
                Outputs({"age_a": jnp.asarray(s)[:, None]}),
                Batch({}, {"age": jnp.asarray(t)}, jnp.ones(64, bool), jnp.arange(64)),
            )
            for t, s in zip(truth, said)
        ]
        return metrics.compute(jax.tree.map(lambda *x: sum(x[1:], x[0]), *sums))["tasks"]["age"]

    centered, plain = figures(centers={"age": mean + 3}), figures()
    exact = np.float64(truth).ravel(), np.float64(said).ravel()
    assert centered["r2"] == pytest.approx(r2_score(*exact), abs=1e-3)
    assert np.isnan(plain["r2"])  # and no number that means nothing
    assert centered["rmse"] == plain["rmse"] == pytest.approx(root_mean_squared_error(*exact), rel=1e-4)


def test_what_cannot_be_told_is_nan():
    metrics = RegressionMetrics(TASKS[:1], HEADS_OF)

    def figures(truth, said, mask=True):
        n = len(truth)
        batch = Batch({}, {"age": jnp.array(truth)}, jnp.full(n, mask), jnp.arange(n))
        return metrics.compute(metrics.update(Outputs({"age_a": jnp.array(said)[:, None]}), batch))["tasks"]["age"]

    constant = figures([2.0, 2.0], [1.0, 3.0])
    assert constant["rmse"] == 1 and constant["mae"] == 1 and np.isnan(constant["r2"])
    # A model that was judged by nothing is not the best one.
    assert all(np.isnan(v) for v in figures([np.nan, np.nan], [1.0, 3.0]).values())
    # A prediction that is no number is an error, not one that is passed over.
    assert np.isnan(figures([2.0, 3.0], [1.0, np.nan])["rmse"])
    with pytest.raises(ValueError, match="no example"):
        figures([2.0], [1.0], mask=False)


def test_figures_in_words_and_by_name(rng):
    metrics = RegressionMetrics(TASKS, HEADS_OF)
    figures = metrics.compute(metrics.update(*evaluated(rng)))
    scalars = metrics.scalars(figures)
    assert tuple(scalars) == metrics.names
    assert metrics.main == metrics.own(figures) == "place/rmse"
    assert {n.split("/")[1]: lower_is_better(n) for n in metrics.names} == {"rmse": True, "mae": True, "r2": False}
    assert metrics.headline(figures).startswith(f"age rmse {scalars['age/rmse']:.4g}  place rmse ")
    assert metrics.progress({"loss": 0.25}) == "loss 0.250"
    # A stage that answers one task is judged by that.
    outputs, batch = evaluated(rng)
    some = metrics.compute(metrics.update(Outputs({"age_b": outputs.logits["age_b"]}), batch))
    assert metrics.own(some) == "age/rmse"


def test_declarations_that_do_not_fit(rng):
    with pytest.raises(DeclarationError, match=r"centers are given for \['size'\]"):
        RegressionMetrics(TASKS, HEADS_OF, {"size": 1.0})
    outputs, batch = evaluated(rng)
    wrong = [TASKS[0], Task("place", "age", 2, kind="regression")]
    with pytest.raises(DeclarationError, match=r"'place' predicts \(2,\) numbers, target 'age' holds \(1,\)"):
        RegressionMetrics(wrong, HEADS_OF).update(outputs, batch)


# ---------------------------------------------------------------------- beside classification

MIXED = [*[Task(l, l, toy.TREE.size(l), l) for l in toy.TREE.levels], Task("age", "age", 1, kind="regression")]
MIXED_HEADS = [Head(t.name, {"g": "grad"}) for t in MIXED]


def both():
    return ClassificationMetrics(toy.TREE, MIXED, MIXED_HEADS), RegressionMetrics(MIXED, MIXED_HEADS)


def mixed_batch(rng, n=12):
    sub = rng.integers(0, 4, n)
    targets = {"super": toy.TREE.parents[1][sub], "sub": sub, "age": rng.normal(size=n).astype(np.float32)}
    logits = {t.name: jnp.asarray(rng.normal(size=(n, t.classes)), jnp.float32) for t in MIXED}
    return Outputs(logits), Batch({}, jax.tree.map(jnp.asarray, targets), jnp.ones(n, bool), jnp.arange(n))


def test_each_kind_of_metrics_passes_the_other_tasks_over(rng):
    outputs, batch = mixed_batch(rng)
    classes, numbers = both()
    alone = ClassificationMetrics(toy.TREE, MIXED[:2], MIXED_HEADS[:2])
    jax.tree.map(np.testing.assert_array_equal, classes.update(outputs, batch), alone.update(outputs, batch))
    assert classes.names == alone.names and classes.main == "sub/accuracy"
    assert list(numbers.compute(numbers.update(outputs, batch))["tasks"]) == ["age"]


def test_joined_metrics_are_their_parts(rng):
    outputs, batch = mixed_batch(rng)
    classes, numbers = both()
    metrics = Metrics([classes, numbers])
    sums = jax.jit(metrics.update)(outputs, batch)
    figures = metrics.compute(jax.tree.map(jnp.add, sums, metrics.update(outputs, batch)), full=True)
    parts = [p.compute(jax.tree.map(jnp.add, *[p.update(outputs, batch)] * 2), full=True) for p in (classes, numbers)]
    jax.tree.map(lambda a, b: a == pytest.approx(b) or pytest.fail(f"{a} {b}"), figures, parts[0] | parts[1])
    assert metrics.scalars(figures) == pytest.approx(classes.scalars(parts[0]) | numbers.scalars(parts[1]))
    assert set(metrics.scalars(figures)) == set(metrics.names) and len(set(metrics.names)) == len(metrics.names)
    assert metrics.main == metrics.own(figures) == "sub/accuracy"
    assert Metrics([numbers, classes]).main == "age/rmse"
    assert metrics.headline(figures) == f"{classes.headline(figures)}  {numbers.headline(figures)}"
    assert metrics.progress({"loss": 1.0, "accuracy/sub": 0.5}) == "loss 1.000  sub 50.0%"


def test_joined_metrics_of_what_a_stage_answers(rng):
    outputs, batch = mixed_batch(rng)
    metrics = Metrics(both())
    for names, own in ((("age",), "age/rmse"), (("super",), "super/accuracy")):
        figures = metrics.compute(metrics.update(Outputs({n: outputs.logits[n] for n in names}), batch))
        assert metrics.own(figures) == own and own in metrics.scalars(figures)
        assert set(metrics.scalars(figures)) < set(metrics.names)


def test_parts_that_do_not_join():
    classes, numbers = both()
    for parts in ([], [numbers, classes, numbers]):
        with pytest.raises(DeclarationError, match="different kinds"):
            Metrics(parts)


def test_the_objective_adds_squared_errors_and_mixes_them(rng):
    outputs, batch = mixed_batch(rng)
    age = batch.targets["age"].at[3].set(np.nan)
    batch = batch.replace(targets=batch.targets | {"age": age}, mask=batch.mask.at[0].set(False))
    objective = Objective(MIXED, MIXED_HEADS, taxonomy=toy.TREE)
    loss, seen = objective(outputs, batch)
    error = np.asarray(outputs.logits["age"])[:, 0] - np.asarray(age)
    counts = np.isfinite(error) & np.asarray(batch.mask)
    np.testing.assert_allclose(seen["loss/age"], 0.5 * (error[counts] ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, sum(seen[f"loss/{t.name}"] for t in MIXED), rtol=1e-5)
    assert "accuracy/age" not in seen

    # Of a mixed row both targets count by their shares, if they are known.
    share = jnp.asarray(rng.uniform(0.2, 0.8, 12), jnp.float32)
    partner = jax.tree.map(lambda x: x[jnp.arange(12) ^ 1], batch.targets)
    _, seen = objective(outputs, batch.replace(partner=partner, share=share))
    said = np.asarray(outputs.logits["age"])[:, 0]
    losses = 0.5 * np.concatenate([said - np.asarray(age), said - np.asarray(partner["age"])]) ** 2
    weights = np.concatenate([share, 1 - share]) * np.tile(np.asarray(batch.mask), 2)
    known = np.isfinite(losses)
    np.testing.assert_allclose(seen["loss/age"], np.average(losses[known], weights=weights[known]), rtol=1e-5)


def test_no_known_number_contributes_exactly_nothing(rng):
    outputs, batch = mixed_batch(rng)
    batch = batch.replace(targets=batch.targets | {"age": jnp.full(12, np.nan)})
    objective = Objective(MIXED, MIXED_HEADS, taxonomy=toy.TREE)
    alone = lambda z: objective(Outputs({"age": z}), batch)[0]
    value, grad = jax.value_and_grad(alone)(outputs.logits["age"])
    assert value == 0 and (grad == 0).all()


# ---------------------------------------------------------------------- a model


class Columns(nn.Module):
    """A branch whose features are the columns themselves."""

    width: int = 3

    @property
    def feature_info(self):
        return {"columns": FeatureInfo(self.width)}

    def __call__(self, inputs, taps, *, train=False):
        return {tap: Features(inputs[tap]) for tap in taps}


def test_a_model_descends_to_least_squares(rng):
    """Gradient descent on the objective ends where scikit-learn's closed form lies."""
    x = rng.normal(size=(80, 3)).astype(np.float32)
    y = (x @ rng.normal(size=(3, 2)) + rng.normal(0, 0.3, (80, 2)) + (1, -2)).astype(np.float32)
    tasks, heads = [Task("y", "y", 2, kind="regression")], [Head("y", {"g": "grad"})]
    model = MultiGranularityModel([Granularity("g", "columns", "columns")], tasks, heads, {"columns": Columns()})
    op = OperatingPoint(("g",), ("y",))
    batch = Batch({"columns": jnp.asarray(x)}, {"y": jnp.asarray(y)}, jnp.ones(80, bool), jnp.arange(80))
    variables = model.init(jax.random.key(0), batch.inputs, op, train=False)
    objective, metrics = Objective(tasks, heads), RegressionMetrics(tasks, heads)

    @jax.jit
    def descend(variables):
        loss = lambda v: objective(model.apply(v, batch.inputs, op, train=True), batch)[0]
        step = lambda _, v: jax.tree.map(lambda p, g: p - 0.3 * g, v, jax.grad(loss)(v))
        return jax.lax.fori_loop(0, 300, step, variables)

    outputs = model.apply(descend(variables), batch.inputs, op, train=False)
    closed = LinearRegression().fit(x, y)
    np.testing.assert_allclose(outputs.logits["y"], closed.predict(x), atol=1e-3)
    r2 = metrics.compute(metrics.update(outputs, batch))["tasks"]["y"]["r2"]
    assert r2 == pytest.approx(r2_score(y, closed.predict(x), multioutput="variance_weighted"), abs=1e-3)


def test_training_reports_levels_and_regressions_side_by_side(tmp_path):
    """Through the loop: the image's brightness is learned beside its labels, and told in the run's figures."""

    def source(seed):
        images = toy.source(64, seed)
        bright = images.arrays["image"].mean((1, 2, 3), dtype=np.float64).astype(np.float32) / 50 - 2
        return ArraySource(images.arrays | {"brightness": np.where(np.arange(64) % 5, bright, np.nan)}, "toy")

    feeds = Feeds(
        train=lambda stage, seen, steps: train_batches(
            source(0), toy.TREE, batch_size=16, seed=0, examples_seen=seen, steps=steps, targets=("brightness",)
        ),
        validation=lambda: eval_batches(source(1), toy.TREE, batch_size=24, targets=("brightness",)),
        test=lambda: eval_batches(source(2), toy.TREE, batch_size=24, targets=("brightness",)),
        eval_batch_size=24,
    )
    plain = toy.model()
    model = plain.clone(
        tasks=[*plain.tasks, Task("brightness", "brightness", 1, kind="regression")],
        heads=[*plain.heads, Head("brightness", {"coarse": "grad"})],
    )
    metrics = Metrics([RegressionMetrics(model.tasks, model.heads), ClassificationMetrics(toy.TREE, model.tasks, model.heads)])
    plan = (Stage("all", model.everything, steps=40, batch_size=16),)
    report = toy.run(
        tmp_path,
        model=model,
        plan=plan,
        feeds=feeds,
        metrics=metrics,
        log=LogConfig(every=10, validate_every=20),
        stop=StopConfig(metric="brightness/rmse", use="best"),
    )
    test = report["test"]
    assert set(test["levels"]) == {"super", "sub"} and test["examples"] == 64
    assert test["tasks"]["brightness"]["r2"] > 0.5
    record = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [r["val/brightness/rmse"] for r in record if "val/brightness/rmse" in r]
    assert len(seen) >= 2 and seen[-1] < np.nanstd(source(1).arrays["brightness"])
    assert any("loss/brightness" in r and "accuracy/sub" in r for r in record)
