"""Penalties against closed forms and scikit-learn, parameter groups against optimisers of their own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets, linear_model

from mgjax.config import ConfigError
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError
from mgjax.train.optim import (
    OptimConfig,
    Optimizer,
    ParamGroup,
    group_soft_threshold,
    make_optimizer,
    make_schedule,
    resolve_groups,
    soft_threshold,
)

PLAIN = OptimConfig(momentum=0.0, weight_decay=0.0)


def plain(**keys):
    """Gradient descent, without momentum unless it is given."""
    return OptimConfig(**{"momentum": 0.0, "weight_decay": 0.0} | keys)


def step(optimizer, params, grads, rates, state=None):
    updates, state = optimizer.update(grads, optimizer.init(params) if state is None else state, params)
    return optimizer.apply(params, updates, rates), state


def descend(optimizer: Optimizer, loss, params, rate, x, y, *, steps: int):
    """Full-batch descent in float32, from float64 data."""
    after = _descend(optimizer, loss, params, rate, jnp.asarray(x, jnp.float32), jnp.asarray(y), steps=steps)
    return {path: np.asarray(p) for path, p in after.items()}


@functools.partial(jax.jit, static_argnames=("optimizer", "loss", "steps"))
def _descend(optimizer: Optimizer, loss, params, rate, *data, steps: int):
    """The optimiser is a static argument: equal ones are equal and hash alike."""

    def one(carry, _):
        params, state = carry
        return step(optimizer, params, jax.grad(loss)(params, *data), rate, state), None

    return jax.lax.scan(one, (params, optimizer.init(params)), None, steps)[0][0]


def squared_error(params, x, y):
    """½ · the mean over examples of the squared error, summed over outputs."""
    return 0.5 * jnp.sum((x @ params["kernel"] + params["bias"][None] - y) ** 2) / len(x)


def standardised(x):
    return (x - x.mean(0)) / x.std(0)


def lipschitz(x):
    """The largest curvature of `squared_error`."""
    return float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])


@pytest.fixture(scope="module")
def diabetes():
    x, y = datasets.load_diabetes(return_X_y=True)
    return standardised(x), standardised(y[:, None])


def zeros(x, y):
    return {"kernel": jnp.zeros((x.shape[1], y.shape[1])), "bias": jnp.zeros(y.shape[1])}


# ---------------------------------------------------------------------- proximal operators


def test_soft_threshold_is_the_minimiser():
    x = np.linspace(-2, 2, 41, dtype=np.float32)
    got = np.asarray(soft_threshold(jnp.array(x), 0.75))
    np.testing.assert_allclose(got, np.where(x > 0.75, x - 0.75, np.where(x < -0.75, x + 0.75, 0.0)), atol=1e-7)
    assert (got[np.abs(x) <= 0.75] == 0).all() and (got[np.abs(x) > 0.76] != 0).all()
    objective = lambda y: 0.5 * (y - x) ** 2 + 0.75 * np.abs(y)
    for near in (-0.1, -0.01, 0.01, 0.1):
        assert (objective(got) < objective(got + near)).all()


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 2, 5)])
def test_group_soft_threshold_shortens_or_removes_whole_units(shape):
    w = np.array(jax.random.normal(jax.random.key(0), shape)) * np.array([0.01, 0.3, 1.0, 2.0, 0.0], np.float32)
    root, t = math.sqrt(math.prod(shape[:-1])), 0.2
    got = np.asarray(group_soft_threshold(jnp.array(w), t))
    gone = []
    for j in range(5):
        norm = np.linalg.norm(w[..., j])
        gone.append(norm <= t * root)
        expected = np.zeros_like(w[..., j]) if gone[j] else w[..., j] * (1 - t * root / norm)
        np.testing.assert_allclose(got[..., j], expected, rtol=1e-5)
        assert (got[..., j] == 0).all() == gone[j]
    assert gone == [True, gone[1], False, False, True]


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3, 3)])
def test_l1_then_groups_is_the_operator_of_their_sum(shape):
    """Optimality: x − y lies in the subdifferential of t₁‖y‖₁ + t₂√n‖y_j‖₂ at y."""
    x, rate, l1, lasso = np.array(jax.random.normal(jax.random.key(2), shape)), 0.5, 0.6, 0.3
    x[..., 0] *= 0.35 / np.abs(x[..., 0]).max()  # so small that the whole unit goes, by the norm
    optimizer = make_optimizer(plain(l1=l1, group_lasso=lasso))
    y = np.asarray(optimizer.apply({"k": jnp.array(x)}, {"k": jnp.zeros(shape)}, rate)["k"])
    bound = rate * lasso * math.sqrt(math.prod(shape[:-1]))
    left = np.maximum(np.abs(x[..., 0]) - rate * l1, 0)  # what is left for the norm where L1 has done its best
    assert (y[..., 0] == 0).all() and 0 < np.linalg.norm(left) <= bound
    for j in (1, 2):
        assert np.linalg.norm(y[..., j]) > 0
        rest = x[..., j] - y[..., j] - bound * y[..., j] / np.linalg.norm(y[..., j])
        there = y[..., j] != 0
        np.testing.assert_allclose(rest[there], rate * l1 * np.sign(y[..., j][there]), rtol=1e-4)
        assert (np.abs(rest[~there]) <= rate * l1 + 1e-6).all()
    assert (y[..., 1:] == 0).any()  # so that both kinds of coordinates were looked at


def test_no_step_and_no_penalty_are_the_identity_to_the_bit():
    k = jnp.array([[1e-30, -0.0, 0.3], [-1e-30, 0.0, -7e12]])  # squares that vanish, signs of zeros
    bits = np.asarray(k).view(np.int32)
    for operator in (soft_threshold, group_soft_threshold):
        for threshold in (0.0, jnp.float32(0)):
            np.testing.assert_array_equal(np.asarray(jax.jit(operator)(k, threshold)).view(np.int32), bits)
    still = {"k": jnp.zeros((2, 3))}
    for config, rate in ((plain(l1=0.1, group_lasso=0.1), 0.0), (PLAIN, 0.1)):
        got = jax.jit(make_optimizer(config).apply)({"k": k}, still, rate)["k"]
        np.testing.assert_array_equal(np.asarray(got).view(np.int32), bits)


def test_without_a_penalty_nothing_is_added_to_the_program():
    k = {"kernel": jnp.ones((2, 3))}

    def primitives(config):
        jaxpr = jax.make_jaxpr(make_optimizer(config).apply)(k, k, jnp.float32(0.1)).jaxpr
        return [eqn.primitive.name for eqn in jaxpr.eqns]

    assert primitives(PLAIN) == ["mul", "sub"]
    assert "sign" in primitives(plain(l1=0.1)) and "sqrt" in primitives(plain(group_lasso=0.1))


def test_what_is_not_finite_stays_so():
    k = jnp.array([[jnp.nan, 1.0], [1.0, 1.0]])
    assert np.isnan(soft_threshold(k, 0.1)[0, 0]) and np.isnan(group_soft_threshold(k, 0.1)[:, 0]).all()  # as their norm
    assert np.isfinite(group_soft_threshold(k, 0.1)[:, 1]).all()


def test_penalties_leave_biases_alone_and_keep_the_type():
    params = {"kernel": jnp.full((2, 2), 0.01, jnp.bfloat16), "bias": jnp.full(2, 0.01, jnp.bfloat16)}
    optimizer = make_optimizer(plain(l1=1.0, group_lasso=1.0, weight_decay=1.0))
    after, _ = step(optimizer, params, jax.tree.map(jnp.zeros_like, params), jnp.float32(0.1))
    assert (after["kernel"] == 0).all() and {p.dtype for p in after.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(after["bias"], params["bias"])


# ---------------------------------------------------------------------- solutions


def test_proximal_l1_finds_the_lasso_of_scikit_learn(diabetes):
    x, y = diabetes
    theirs = linear_model.Lasso(alpha=0.05, tol=1e-10, max_iter=100_000).fit(x, y[:, 0])
    ours = descend(make_optimizer(plain(l1=0.05)), squared_error, zeros(x, y), 1 / lipschitz(x), x, y, steps=4000)
    kernel = ours["kernel"][:, 0]
    assert (kernel == 0).tolist() == (theirs.coef_ == 0).tolist() and 2 < (kernel == 0).sum() < 8
    np.testing.assert_allclose(kernel, theirs.coef_, rtol=1e-3)


def test_with_coupled_decay_it_is_the_elastic_net(diabetes):
    x, y = diabetes
    alpha, ratio = 0.1, 0.5
    theirs = linear_model.ElasticNet(alpha=alpha, l1_ratio=ratio, tol=1e-10, max_iter=100_000).fit(x, y[:, 0])
    config = plain(l1=alpha * ratio, weight_decay=alpha * (1 - ratio))
    ours = descend(make_optimizer(config), squared_error, zeros(x, y), 1 / lipschitz(x), x, y, steps=4000)
    kernel = ours["kernel"][:, 0]
    assert (kernel == 0).tolist() == (theirs.coef_ == 0).tolist() and (kernel == 0).sum() > 0
    np.testing.assert_allclose(kernel, theirs.coef_, rtol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_coupled_decay_is_ridge_regression_whatever_the_momentum(diabetes, momentum):
    x, y = diabetes
    config = plain(weight_decay=0.2, momentum=momentum)
    rate = (1 - momentum) / (lipschitz(x) + 0.2)
    ours = descend(make_optimizer(config), squared_error, zeros(x, y), rate, x, y, steps=2000)
    expected = np.linalg.solve(x.T @ x / len(x) + 0.2 * np.eye(x.shape[1]), x.T @ y / len(x))
    np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-3, atol=1e-6)


def test_what_goes_around_momentum(diabetes):
    """Thresholds grow with it, so that the lasso is the same; decoupled decay is the ridge of (1 − μ) · decay."""
    x, y = diabetes
    config = plain(momentum=0.9, l1=0.05)
    ours = descend(make_optimizer(config), squared_error, zeros(x, y), 0.1 / lipschitz(x), x, y, steps=6000)
    theirs = linear_model.Lasso(alpha=0.05, tol=1e-10, max_iter=100_000).fit(x, y[:, 0])
    np.testing.assert_allclose(ours["kernel"][:, 0], theirs.coef_, rtol=2e-3)
    config = plain(momentum=0.9, weight_decay=2.0, decay="decoupled")
    ours = descend(make_optimizer(config), squared_error, zeros(x, y), 0.1 / lipschitz(x), x, y, steps=2000)
    theirs = linear_model.Ridge(alpha=0.2 * len(x), tol=1e-10).fit(x, y[:, 0])
    np.testing.assert_allclose(ours["kernel"][:, 0], theirs.coef_, rtol=1e-3, atol=1e-6)


def test_the_group_lasso_removes_outputs_that_nothing_explains(diabetes):
    """Karush–Kuhn–Tucker: −∇ = λ√n w_j / ‖w_j‖ where unit j is there, ‖∇_j‖ <= λ√n where it is not."""
    x, y = diabetes
    noise = np.random.default_rng(0).normal(size=(len(x), 2))
    targets = np.concatenate([y, noise[:, :1], y[::-1] * 0.05 + x[:, 2:3], noise[:, 1:]], 1)
    strength = 0.06
    optimizer = make_optimizer(plain(group_lasso=strength))
    start = {"kernel": jax.random.normal(jax.random.key(0), (10, 4)), "bias": jnp.zeros(4)}
    after = descend(optimizer, squared_error, start, 1 / lipschitz(x), x, targets, steps=4000)
    w = after["kernel"].astype(np.float64)
    g = x.T @ (x @ w + after["bias"][None] - targets) / len(x)
    bound = strength * math.sqrt(10)
    assert (w == 0).all(0).tolist() == [False, True, False, True] and (w != 0).all(0).tolist() == [True, False, True, False]
    for j in range(4):
        if j in (0, 2):
            np.testing.assert_allclose(-g[:, j], bound * w[:, j] / np.linalg.norm(w[:, j]), rtol=1e-3, atol=1e-4)
        else:
            assert np.linalg.norm(g[:, j]) < bound


def test_multinomial_regression_agrees_with_scikit_learn():
    x, y = datasets.load_wine(return_X_y=True)
    x, strength = standardised(x), 0.5
    theirs = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(x, y)

    def loss(params, x, y):
        logits = x @ params["kernel"] + params["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = make_optimizer(OptimConfig(weight_decay=1 / (strength * len(x))))
    ours = descend(optimizer, loss, {"kernel": jnp.zeros((13, 3)), "bias": jnp.zeros(3)}, 0.2 / lipschitz(x), x, y, steps=4000)
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours["kernel"], theirs.coef_.T, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(ours["bias"], theirs.intercept_ - theirs.intercept_.mean(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- decay


@pytest.mark.parametrize(
    "keys, theirs",
    [
        (dict(name="sgd"), [optax.add_decayed_weights(0.1), optax.trace(0.9, nesterov=True)]),
        (dict(name="sgd", decay="coupled"), [optax.add_decayed_weights(0.1), optax.trace(0.9, nesterov=True)]),
        (dict(name="sgd", decay="decoupled"), [optax.trace(0.9, nesterov=True), optax.add_decayed_weights(0.1)]),
        (dict(name="adamw"), [optax.scale_by_adam(), optax.add_decayed_weights(0.1)]),
        (dict(name="adamw", decay="decoupled"), [optax.scale_by_adam(), optax.add_decayed_weights(0.1)]),
        (dict(name="adamw", decay="coupled"), [optax.add_decayed_weights(0.1), optax.scale_by_adam()]),
    ],
)
def test_decay_is_added_before_or_after_the_moments(keys, theirs):
    ours, theirs = make_optimizer(OptimConfig(weight_decay=0.1, **keys)), optax.chain(*theirs)
    p = q = {"kernel": jax.random.normal(jax.random.key(0), (3, 2))}
    a, b = ours.init(p), theirs.init(q)
    for i in range(4):
        grads = {"kernel": jnp.sin(p["kernel"] + i)}
        p, a = step(ours, p, grads, 0.3, a)
        u, b = theirs.update(grads, b, q)
        q = optax.apply_updates(q, jax.tree.map(lambda u: -0.3 * u, u))
    np.testing.assert_allclose(p["kernel"], q["kernel"], rtol=1e-5)


def test_adam_scales_coupled_decay_away_and_decoupled_not():
    """Where the gradient is 0, the first step is sign(p) of any coupled strength, and strength · p decoupled."""
    p = {"kernel": jnp.array([[2.0, -3.0]])}
    none = {"kernel": jnp.zeros((1, 2))}
    for strength in (0.01, 0.5):
        make = lambda decay, s=strength: make_optimizer(OptimConfig("adamw", weight_decay=s, decay=decay))
        coupled, _ = make("coupled").update(none, make("coupled").init(p), p)
        decoupled, _ = make("decoupled").update(none, make("decoupled").init(p), p)
        np.testing.assert_allclose(coupled["kernel"], [[1.0, -1.0]], rtol=1e-5)
        np.testing.assert_allclose(decoupled["kernel"], strength * p["kernel"], rtol=1e-6)


def test_the_state_is_that_of_the_transformation_alone():
    """Penalties keep no state, so a checkpoint does not depend on them."""
    params = {"a/kernel": jnp.ones((2, 2)), "a/bias": jnp.ones(2)}
    for name, moments in (("sgd", optax.trace(0.9)), ("adamw", optax.scale_by_adam())):
        with_all = make_optimizer(OptimConfig(name, l1=0.1, group_lasso=0.1, weight_decay=0.1)).init(params)
        without = make_optimizer(OptimConfig(name, weight_decay=0.0)).init(params)
        assert jax.tree.structure(with_all) == jax.tree.structure(without)
        expected = {path: moments.init(p) for path, p in params.items()}
        assert jax.tree.map(jnp.shape, jax.tree.leaves(with_all)) == jax.tree.map(jnp.shape, jax.tree.leaves(expected))


# ---------------------------------------------------------------------- what is reported


def test_penalties_have_their_values_and_gradients():
    kernels = {"a/kernel": jax.random.normal(jax.random.key(0), (3, 2)), "b/kernel": jnp.ones((2, 2, 1, 4))}
    params = kernels | {"b/bias": jnp.ones(4)}
    norms = lambda p: jnp.sqrt(jnp.sum(p.reshape(-1, p.shape[-1]) ** 2, 0))
    values = {
        "l2": lambda ps: sum(0.05 * jnp.sum(p**2) for p in ps.values()),
        "l1": lambda ps: sum(0.2 * jnp.sum(jnp.abs(p)) for p in ps.values()),
        "group_lasso": lambda ps: sum(0.3 * math.sqrt(p.size // p.shape[-1]) * jnp.sum(norms(p)) for p in ps.values()),
    }
    found = jax.jit(make_optimizer(plain(weight_decay=0.1, l1=0.2, group_lasso=0.3)).penalties)(params)
    assert found.keys() == values.keys()
    for name, value in values.items():
        expected, gradient = jax.value_and_grad(value)(kernels)
        np.testing.assert_allclose(found[name][0], expected, rtol=1e-5)
        assert found[name][1].keys() == kernels.keys()
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found[name][1], gradient)


def test_only_penalties_in_force_are_reported_and_nothing_at_zero_pulls():
    nothing = {"kernel": jnp.zeros((2, 3)), "bias": jnp.ones(3)}
    assert make_optimizer(PLAIN).penalties(nothing) == {}
    found = make_optimizer(OptimConfig("adamw", weight_decay=0.1, l1=0.1, group_lasso=0.1)).penalties(nothing)
    assert sorted(found) == ["group_lasso", "l1", "weight_decay"]
    for value, gradient in found.values():
        assert value == 0 and gradient.keys() == {"kernel"} and (gradient["kernel"] == 0).all()
    assert make_optimizer(OptimConfig(l1=0.1)).penalties({"bias": nothing["bias"]}) == {}
    groups = ParamGroup("a", optimizer="adamw"), ParamGroup("b"), ParamGroup("*", weight_decay=0.0)
    params = {name: jnp.full((1, 1), 2.0) for name in "abc"}
    found = make_optimizer(OptimConfig(weight_decay=0.5), groups).penalties(params)
    assert {name: (float(v), sorted(g)) for name, (v, g) in found.items()} == {"weight_decay": (1.0, ["a"]), "l2": (1.0, ["b"])}


# ---------------------------------------------------------------------- groups

PARAMS = {
    "branches_trunk/kernel": jax.random.normal(jax.random.key(1), (3, 4)),
    "branches_trunk/bias": jnp.ones(4),
    "head_class/kernel": jax.random.normal(jax.random.key(2), (4, 2)),
    "head_class/bias": jnp.full(2, 2.0),
}
BASE = OptimConfig(learning_rate=0.1, weight_decay=0.01, clip=0.5)


def grads_at(i):
    return jax.tree.map(lambda p: jnp.cos(3 * p + i), PARAMS)


def part(tree, prefix):
    return {path: x for path, x in tree.items() if path.startswith(prefix)}


@pytest.mark.parametrize(
    "said, alone",
    [
        (dict(), dict()),
        (dict(optimizer="adamw"), dict(name="adamw")),
        (dict(optimizer="adamw", decay="coupled"), dict(name="adamw", decay="coupled")),
        (dict(momentum=0.5), dict(momentum=0.5)),
        (dict(weight_decay=0.3), dict(weight_decay=0.3)),
        (dict(weight_decay=0.0), dict(weight_decay=0.0)),
        (dict(weight_decay=0.3, decay="decoupled"), dict(weight_decay=0.3, decay="decoupled")),
        (dict(l1=0.05), dict(l1=0.05)),
        (dict(group_lasso=0.05), dict(group_lasso=0.05)),
        (dict(clip=0.2), dict(clip=0.2)),
        (dict(clip=0.0), dict(clip=0.0)),
        (dict(adaptive_clip=0.01), dict(adaptive_clip=0.01)),
    ],
)
def test_a_group_is_an_optimiser_of_its_own(said, alone):
    """The heads do as if they were alone with the group's config, the rest as if there were no group."""
    own = {"clip": 0.0} | alone
    groups = ParamGroup("head_*", **{"clip": 0.0} | said), ParamGroup("*")
    optimizer = make_optimizer(BASE, groups, PARAMS)
    heads = make_optimizer(OptimConfig(**dict(learning_rate=0.1, weight_decay=0.01) | own))
    both, parts = PARAMS, {"head": part(PARAMS, "head"), "branches": part(PARAMS, "branches")}
    alone = {"head": heads, "branches": make_optimizer(BASE)}
    state, states = optimizer.init(both), {name: alone[name].init(parts[name]) for name in parts}
    for i in range(3):
        both, state = step(optimizer, both, grads_at(i), 0.1, state)
        for name in parts:
            parts[name], states[name] = step(alone[name], parts[name], part(grads_at(i), name), 0.1, states[name])
    for path, expected in (parts["head"] | parts["branches"]).items():
        np.testing.assert_array_equal(both[path], expected, err_msg=path)
    if said:  # and it does make a difference to the heads
        same = make_optimizer(BASE, (ParamGroup("head_*", clip=0.1), ParamGroup("*")))
        other, _ = step(same, PARAMS, grads_at(0), 0.1)
        assert (other["head_class/kernel"] != step(optimizer, PARAMS, grads_at(0), 0.1)[0]["head_class/kernel"]).any()


def test_the_common_norm_is_of_all_groups_without_their_own():
    groups = ParamGroup("head_class/kernel", clip=0.3), ParamGroup("head_*", learning_rate=3.0), ParamGroup("*")
    optimizer = make_optimizer(OptimConfig(momentum=0.0, weight_decay=0.0, clip=0.5), groups)
    updates, _ = optimizer.update(grads_at(0), optimizer.init(PARAMS), PARAMS)
    own = updates.pop("head_class/kernel")
    assert float(jnp.linalg.norm(own)) == pytest.approx(0.3) and float(optax.tree.norm(updates)) == pytest.approx(0.5)
    # What does not move does not count.
    few, _ = optimizer.update({"head_class/bias": grads_at(0)["head_class/bias"]}, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(few)) == pytest.approx(0.5) and few.keys() == {"head_class/bias"}


def test_rates_are_factors_of_the_stage_or_schedules_of_their_own():
    cosine = lambda progress: 0.5 * (1 + math.cos(math.pi * progress))
    groups = (
        ParamGroup("head_class/kernel", learning_rate=10.0),
        ParamGroup("head_*", learning_rate=0.5, schedule=cosine),
        ParamGroup("*"),
    )
    optimizer = make_optimizer(BASE, groups)
    rates = optimizer.rates(0.4, 20, 0.2, 0.1)
    stage = np.array([make_schedule(0.4, 20, 0.2, 0.1)(t) for t in range(20)])
    assert rates.shape == (20, 3) and rates.dtype == np.float32
    np.testing.assert_allclose(rates[:, 0], 10 * stage, rtol=1e-6)
    np.testing.assert_allclose(rates[:, 2], stage, rtol=1e-6)
    # Progress is that of the stage's schedule: this one is the same without warm-up.
    np.testing.assert_allclose(rates[:, 1], [make_schedule(0.2, 20, 0.0, 0.0)(t) for t in range(20)], rtol=1e-5)


def test_each_group_steps_by_its_rate_and_shrinks_by_it():
    groups = ParamGroup("head_*", learning_rate=10.0, l1=0.1), ParamGroup("*")
    optimizer = make_optimizer(plain(), groups)
    after, _ = step(optimizer, PARAMS, grads_at(0), 0.1)
    row, _ = jax.jit(functools.partial(step, optimizer))(PARAMS, grads_at(0), jnp.array([1.0, 0.1]))
    for path, g in grads_at(0).items():
        rate = 1.0 if path.startswith("head") else 0.1
        moved = PARAMS[path] - rate * g
        if path == "head_class/kernel":
            moved = np.sign(moved) * np.maximum(np.abs(moved) - rate * 0.1, 0)
        np.testing.assert_allclose(after[path], moved, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(row[path], moved, rtol=1e-5, atol=1e-7)


def test_what_has_no_gradient_keeps_value_and_state_to_the_bit():
    config = OptimConfig("adamw", weight_decay=0.1, l1=0.1, group_lasso=0.1, clip=1.0)
    groups = ParamGroup("head_*", optimizer="sgd", momentum=0.5), ParamGroup("*")
    optimizer = make_optimizer(config, groups)
    params, state = step(optimizer, PARAMS, grads_at(0), 0.1)
    later, after = step(optimizer, params, part(grads_at(1), "head"), 0.1, state)
    assert later.keys() == PARAMS.keys() and jax.tree.structure(after) == jax.tree.structure(state)
    for path in PARAMS:
        pairs = zip(jax.tree.leaves((later[path], after[path])), jax.tree.leaves((params[path], state[path])))
        assert all((a == b).all() for a, b in pairs) == path.startswith("branches"), path


def test_the_first_group_that_matches_takes_a_parameter():
    groups = ParamGroup(("*/bias", "head_a/*")), ParamGroup("head_*"), ParamGroup("*")
    paths = ["head_a/kernel", "head_b/kernel", "head_b/bias", "trunk/x/kernel", "trunk/x/bias"]
    assert resolve_groups(groups, paths) == dict(zip(paths, [0, 1, 0, 2, 0]))
    assert resolve_groups((ParamGroup("head_*"), ParamGroup("*")), paths[:3]) == dict.fromkeys(paths[:3], 0)


def test_equal_optimisers_are_equal_and_no_group_is_one_of_all():
    make = lambda: make_optimizer(BASE, (ParamGroup("head_*", l1=0.1), ParamGroup("*")))
    assert make() == make() and hash(make()) == hash(make()) and make() != make_optimizer(BASE)
    assert make_optimizer(BASE) == make_optimizer(BASE, (ParamGroup("*"),), PARAMS) == make_optimizer(BASE, [], PARAMS)


@pytest.mark.parametrize(
    "groups, says",
    [
        (
            (ParamGroup("haed_*"), ParamGroup("*")),
            r"'haed_\*' matches no parameter of the model; there are \['branch",
        ),
        ((ParamGroup(("head_*", "fusion/*")), ParamGroup("*")), r"'fusion/\*' matches no parameter"),
        (
            (ParamGroup("head_*"),),
            r"'branches_trunk/kernel' belongs to no parameter group; .*ParamGroup\(\"\*\"\) as",
        ),
        ((ParamGroup("*"), ParamGroup("head_*")), r"'head_\*': groups before it take all that it matches"),
    ],
)
def test_groups_that_do_not_fit_the_model(groups, says):
    with pytest.raises(DeclarationError, match=says):
        make_optimizer(BASE, groups, PARAMS)


def test_a_parameter_of_no_group_is_found_without_paths_too():
    with pytest.raises(DeclarationError, match="'branches_trunk/kernel' belongs to no parameter group"):
        make_optimizer(BASE, (ParamGroup("head_*"),)).init(PARAMS)


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(pattern=()), "needs a pattern"),
        (dict(pattern=("a", "")), "needs a pattern"),
        (dict(learning_rate=-1.0), "'head_*': learning_rate is -1.0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (dict(optimizer="adam"), "'head_*': optimizer is 'adam'; it is one of sgd, adamw"),
        (dict(decay="l2"), "decay is 'l2'"),
        (dict(l1=-0.1), "'head_*': l1 is -0.1; it is at least 0"),
        (dict(momentum=2.0), "momentum is 2.0"),
    ],
)
def test_groups_that_say_what_cannot_be(keys, says):
    with pytest.raises(DeclarationError) as error:
        ParamGroup(**{"pattern": "head_*"} | keys)
    assert says in str(error.value)


def test_bad_rates_schedules_and_configs():
    optimizer = make_optimizer(BASE, (ParamGroup("head_*", schedule=lambda progress: 1 - 2 * progress), ParamGroup("*")))
    with pytest.raises(InputError, match=r"'head_\*' has a schedule of its own"):
        optimizer.apply(PARAMS, PARAMS, 0.1)
    with pytest.raises(InputError, match=r"shape \(3,\); it is \(\) or \(2,\)"):
        optimizer.apply(PARAMS, PARAMS, jnp.ones(3))
    with pytest.raises(DeclarationError, match=r"'head_\*': its schedule is -0.5 at progress 0.75"):
        optimizer.rates(0.1, 4, 0.0, 0.0)
    for config in (OptimConfig(decay="l2"), OptimConfig(l1=-1.0), OptimConfig(group_lasso=math.nan)):
        with pytest.raises(ConfigError, match=r"--config\.optim\."):
            make_optimizer(config)
