import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from mgjax.balancing import BALANCERS, PCGrad, balancer
from mgjax.errors import InputError
from mgjax.granularity import DeclarationError

NAMES = sorted(BALANCERS)
SEAM = [n for n in NAMES if BALANCERS[n].seam]
RANDOM = ["pcgrad", "rlw"]  # what they draw belongs to a place, not to a loss
SUMMED = ["dwa", "rlw", "gradnorm", "mgda"]  # sum to the number of the known, always
KEY = jax.random.key(0)
ALL = jnp.ones(5, bool)
SOME = jnp.array([True, False, True, True, False])


def gradients(seed=0, count=5, dim=12, common=0.5):
    """Random gradients [count, dim] of different lengths, with something in common."""
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(count, dim)) + common * rng.normal(size=(1, dim))
    return parts * rng.uniform(0.5, 2, size=(count, 1))


def gram_of(g):
    return jnp.asarray(np.asarray(g) @ np.asarray(g).T, jnp.float32)


def losses_of(seed=0, count=5):
    return jnp.asarray(np.random.default_rng(seed + 100).uniform(0.2, 3, count), jnp.float32)


def eager(method, state, losses, known, gram, rng=KEY):
    return method(state, losses, known, gram if method.seam else None, rng)


call = jax.jit(eager, static_argnums=0)


def used(method, count=5, steps=5):
    """A state that has seen different batches, two ends of an epoch and all losses."""
    state = method.init(count)
    for i in range(steps):
        _, state = call(method, state, losses_of(i, count), jnp.ones(count, bool), gram_of(gradients(i, count)))
        if i in (1, 3):
            state = method.end_epoch(state)
    return state


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# ---------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_and_scan_say_the_same_as_one_call(name):
    method = balancer(name)
    state = used(method)
    batch = [
        (losses_of(i), known, gram_of(gradients(i)), jax.random.key(i)) for i, known in enumerate((ALL, SOME, ~SOME, ~ALL))
    ]
    close(call(method, state, *batch[1]), eager(method, state, *batch[1]), rtol=1e-3, atol=1e-4)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batch)
    mapped = jax.vmap(lambda *each: call(method, state, *each))(*stacked)
    # The argument of a minimum is known to the root of its rounding.
    one_by_one = [call(method, state, *each) for each in batch]
    close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), rtol=1e-3, atol=1e-4)

    # A scan holds the structure, the shapes and the dtypes of the state.
    def step(state, each):
        weights, state = call(method, state, *each)
        return method.end_epoch(state), weights

    last, weights = jax.lax.scan(step, state, stacked)
    for each, scanned in zip(batch, weights, strict=True):
        state, expected = step(state, each)
        close(scanned, expected, rtol=1e-3, atol=1e-4)
    close(last, state)
    assert weights.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))


UNIT = np.ones((5, 3)) / np.sqrt(3)
SIGNS = np.array([1, -1, 1, -1, 1.0])[:, None]
CORNERS = {
    "nothing is known": (losses_of(), ~ALL, gradients()),
    "one is known": (losses_of(), jnp.arange(5) == 2, gradients()),
    "no gradients": (losses_of(), ALL, 0 * gradients()),
    "one has no gradient": (losses_of(), ALL, gradients() * np.array([1, 1, 0, 1, 1.0])[:, None]),
    "identical gradients": (losses_of(), ALL, UNIT),
    "opposite gradients": (losses_of(), ALL, UNIT * SIGNS),
    "opposite gradients that cancel": (losses_of(), jnp.arange(5) < 4, UNIT * SIGNS),
    "no losses": (0 * losses_of(), ALL, gradients()),
    "tiny": (1e-30 * losses_of(), ALL, 1e-15 * gradients()),
    "huge": (1e30 * losses_of(), ALL, 1e15 * gradients()),
    "of all lengths": (losses_of(), ALL, gradients() * 10.0 ** np.arange(-9, 6, 3)[:, None]),
    "more than dimensions": (losses_of(), ALL, gradients(dim=2)),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", NAMES)
def test_corners_are_finite(name, corner):
    losses, known, g = CORNERS[corner]
    method = balancer(name)
    # From the start, and from where all have been seen; several times, since a state may run away.
    for state in (method.init(5), used(method)):
        for i in range(3):
            weights, state = call(method, state, losses, known, gram_of(g), jax.random.key(i))
            state = method.end_epoch(state)
            assert np.isfinite(weights).all() and all(np.isfinite(x).all() for x in jax.tree.leaves(state))
            assert (weights[~known] == 1).all()
    if name in SUMMED:
        np.testing.assert_allclose(weights[known].sum(), known.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_known_loss_is_learned_as_it_is(name):
    """All methods but one agree on the weight of a loss that is alone; uncertainty learns its size."""
    method = balancer(name)
    weights, _ = call(method, method.init(5), losses_of(), jnp.arange(5) == 2, gram_of(gradients()))
    # The mean gradient is the gradient, and CAGrad goes the further by c along it.
    np.testing.assert_allclose(weights[2], 1.5 if name == "cagrad" else 1, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_unknown_has_no_influence(name):
    method = balancer(name)
    state = used(method)
    losses, gram = losses_of(), gram_of(gradients())
    clean = call(method, state, losses, SOME, gram)
    pairs = SOME[:, None] & SOME[None, :]
    spoiled = call(method, state, jnp.where(SOME, losses, jnp.nan), SOME, jnp.where(pairs, gram, jnp.nan))
    same(spoiled, clean)
    assert (clean[0][~SOME] == 1).all()
    # Its own state stays as it is, that of the known moves, where there is one.
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(clean[1]), strict=True):
        np.testing.assert_array_equal(after[~SOME], before[~SOME])
    if state:
        assert any((state[k] != clean[1][k])[SOME].any() for k in state)
    if name not in RANDOM:  # as if it were not there
        cut = lambda tree: jax.tree.map(lambda x: x[SOME], tree)
        weights, after = call(method, cut(state), losses[SOME], jnp.ones(3, bool), gram[SOME][:, SOME])
        close((weights, after), (clean[0][SOME], cut(clean[1])))


@pytest.mark.parametrize("name", SEAM)
def test_a_loss_without_a_gradient_counts_as_unknown(name):
    method = balancer(name)
    state = used(method)
    g = gradients() * np.asarray(SOME)[:, None]
    losses = losses_of()
    same(call(method, state, losses, ALL, gram_of(g)), call(method, state, losses, SOME, gram_of(g)))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM])
def test_permuted_losses_have_permuted_weights(name):
    method, order = balancer(name), jnp.array([3, 0, 4, 2, 1])
    state, losses, gram = used(method), losses_of(), gram_of(gradients())
    weights, after = call(method, state, losses, SOME, gram)
    permute = lambda tree: jax.tree.map(lambda x: x[order], tree)
    got = call(method, permute(state), losses[order], SOME[order], gram[order][:, order])
    close(got, (weights[order], permute(after)), rtol=1e-4)


@pytest.mark.parametrize("name", SEAM)
def test_a_common_scale_of_the_gradients_changes_nothing(name):
    method = balancer(name)
    g = gradients()
    state, losses = used(method), losses_of()
    expected = call(method, state, losses, ALL, gram_of(g))
    for scale in (2.0**-27, 2.0**20):  # powers of two round inner products alike
        close(call(method, state, losses, ALL, gram_of(scale * g)), expected, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_constants(name):
    method, state = balancer(name), used(balancer(name))
    total = lambda losses, gram: (call(method, state, losses, ALL, gram)[0] * jnp.arange(5.0)).sum()
    for grad in jax.grad(total, (0, 1))(losses_of(), gram_of(gradients())):
        assert (grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_float64_and_bfloat16(name):
    method = balancer(name)
    state, losses, g = used(method), losses_of(), gradients()
    expected = call(method, state, losses, ALL, gram_of(g))
    rough, after = call(method, state, losses.astype(jnp.bfloat16), ALL, gram_of(g))
    assert rough.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(after))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (losses, g @ g.T)]
        weights, after = call(method, state, wide[0], ALL, wide[1])
        assert weights.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(after))
        if name != "rlw":  # its numbers are drawn anew
            close((weights, after), expected, rtol=1e-3)


def test_equal_weights_are_one():
    weights, state = balancer("equal")({}, losses_of(), SOME, None, KEY)
    assert (weights == 1).all() and state == {}


# ---------------------------------------------------------------------- by the values of the losses


def test_uncertainty_follows_the_derivative_and_ends_at_twice_the_loss():
    method = balancer("uncertainty", rate=0.1)
    losses, known = jnp.array([0.05, 1.0, 20.0]), jnp.ones(3, bool)
    objective = lambda s: jnp.sum(jnp.exp(-s) * losses + s / 2)
    state = {"log_variance": jnp.array([-1.0, 0.3, 3.0])}
    weights, after = method(state, losses, known, None, KEY)
    np.testing.assert_allclose(weights, np.exp(-np.asarray(state["log_variance"])), rtol=1e-6)
    moved = state["log_variance"] - 0.1 * jax.grad(objective)(state["log_variance"])
    np.testing.assert_allclose(after["log_variance"], moved, rtol=1e-5)
    state, _ = jax.lax.scan(lambda s, _: (method(s, losses, known, None, KEY)[1], None), method.init(3), length=1000)
    np.testing.assert_allclose(jnp.exp(state["log_variance"]), 2 * losses, rtol=1e-3)


def test_uncertainty_never_jumps_over_its_minimum_nor_runs_away():
    method = balancer("uncertainty", rate=1.0, most=10.0)
    losses, known, state = jnp.array([1e6, 0.0]), jnp.ones(2, bool), method.init(2)
    for _ in range(20):
        weights, state = method(state, losses, known, None, KEY)
    np.testing.assert_allclose(weights, [1 / 2e6, 10], rtol=1e-4)


def test_dynamic_weight_average_by_hand():
    method = balancer("dwa")
    state, known = method.init(2), jnp.ones(2, bool)
    epochs = [([4.0, 2.0], [2.0, 2.0]), ([1.0, 3.0], [2.0, 1.0]), ([0.5, 0.5], [0.5, 0.5])]  # means (3, 2), (1.5, 2), ½
    expected = [[1, 1], [1, 1], 2 * np.exp([0.25, 0.5]) / np.exp([0.25, 0.5]).sum()]
    for epoch, right in zip(epochs, expected, strict=True):
        for losses in epoch:
            weights, state = method(state, jnp.array(losses), known, None, KEY)
            np.testing.assert_allclose(weights, right, rtol=1e-6)
        state = method.end_epoch(state)
    weights, _ = method(state, jnp.ones(2), known, None, KEY)
    scores = np.exp([0.5 / 1.5 / 2, 0.5 / 2 / 2])
    np.testing.assert_allclose(weights, 2 * scores / scores.sum(), rtol=1e-6)
    # An epoch in which the first was not known is none for it.
    _, state = method(state, jnp.array([9.0, 1.0]), jnp.array([False, True]), None, KEY)
    after = method.end_epoch(state)
    np.testing.assert_allclose([after["last"], after["before"]], [[0.5, 1.0], [1.5, 0.5]], rtol=1e-6)


def test_random_weights_are_one_on_average():
    method, known = balancer("rlw"), jnp.array([True, True, False, True])
    draw = jax.vmap(lambda rng: method({}, jnp.ones(4), known, None, rng)[0])
    weights = np.asarray(draw(jax.random.split(KEY, 4000)))
    np.testing.assert_allclose(weights[:, known].sum(1), 3, rtol=1e-5)
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.05)
    # The log ratio of two is normal with variance 2.
    np.testing.assert_allclose(np.log(weights[:, 0] / weights[:, 1]).std(), np.sqrt(2), rtol=0.05)


def test_geometric_weights_are_the_gradient_of_the_geometric_mean():
    losses = losses_of()
    weights, _ = balancer("gls")({}, losses, SOME, None, KEY)
    expected = jax.grad(lambda x: jnp.prod(jnp.where(SOME, x, 1)) ** (1 / 3))(losses)
    np.testing.assert_allclose(weights[SOME], expected[SOME], rtol=1e-5)


# ---------------------------------------------------------------------- by the gradients


def test_gradnorm_is_descent_of_its_objective():
    """One look against autodiff of Σ |G_i − mean(G) · r_i^alpha| by log w, targets held constant."""
    method = balancer("gradnorm", alpha=0.7, rate=0.05)
    state = {"weight": jnp.array([0.5, 1.0, 1.5]), "initial": jnp.array([2.0, 4.0, 1.0])}
    losses, g = jnp.array([1.0, 1.0, 0.9]), gradients(count=3)
    norms = jnp.asarray(np.linalg.norm(g, axis=1), jnp.float32)
    size = lambda v: jnp.exp(v) * norms
    v = jnp.log(state["weight"])
    mean, rate = size(v).mean(), losses / state["initial"]
    target = mean * (rate / rate.mean()) ** 0.7
    slope = jax.grad(lambda v: jnp.abs(size(v) - target).sum())(v)
    expected = jnp.exp(v - 0.05 * slope / mean)
    weights, after = method(state, losses, jnp.ones(3, bool), gram_of(g), KEY)
    np.testing.assert_allclose(weights, 3 * expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(after["weight"], weights, rtol=1e-5)
    np.testing.assert_array_equal(after["initial"], state["initial"])


def test_gradnorm_makes_gradients_equally_long():
    """Three losses ½ s_i · ‖θ − a_i‖² of unequal scales pull at one point. It rests where their forces, all equally long,
    cancel: at Fermat's point of the triangle, (t, t) with 6 t² − 6 t + 1 = 0."""
    method = balancer("gradnorm", alpha=0.0, rate=0.005)
    corners, scales = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0.3, 1.0, 5.0])
    each = lambda theta: 0.5 * scales * jnp.sum((theta[None, :] - corners) ** 2, 1)

    def step(carry, _):
        theta, state = carry
        g = jax.jacobian(each)(theta)
        weights, state = method(state, each(theta), jnp.ones(3, bool), g @ g.T, KEY)
        return (theta - 0.01 * weights @ g, state), weights * jnp.linalg.norm(g, axis=1)

    start = jnp.array([0.6, 0.5])
    (theta, _), norms = jax.lax.scan(step, (start, method.init(3)), length=4000)
    assert norms[0].max() / norms[0].min() > 5
    last = norms[-200:].mean(0)
    np.testing.assert_allclose(last / last.mean(), 1, atol=0.02)
    np.testing.assert_allclose(theta, (3 - np.sqrt(3)) / 6, atol=0.01)


def test_gradnorm_keeps_proportions_through_batches_that_know_some_alone():
    method = balancer("gradnorm", alpha=0.0)
    state, gram = used(method), gram_of(gradients())
    _, alone = method(state, losses_of(), jnp.arange(5) == 2, gram, KEY)
    same(alone, state)


def published_pcgrad(g, orders):
    projected = []
    for i, order in enumerate(orders):
        p = g[i].copy()
        for j in order:
            if j != i and p @ g[j] < 0:
                p -= (p @ g[j]) / (g[j] @ g[j]) * g[j]
        projected.append(p)
    return np.sum(projected, 0)


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_the_published_algorithm(seed):
    """In four dimensions, away from a common direction, nearly all of five gradients conflict with some."""
    rng, g = jax.random.key(seed), gradients(seed, dim=4, common=0)
    weights, _ = call(balancer("pcgrad"), {}, losses_of(), ALL, gram_of(g), rng)
    orders = np.asarray(PCGrad.orders(rng, 5))
    assert (np.sort(orders) == np.arange(5)[None, :]).all() and (weights > 1).any()
    np.testing.assert_allclose(np.asarray(weights) @ g, published_pcgrad(g, orders), rtol=1e-4, atol=1e-4)


def test_pcgrad_draws_an_order_of_its_own_for_each():
    orders = np.asarray(jax.vmap(lambda rng: PCGrad.orders(rng, 3))(jax.random.split(KEY, 600)))
    for row in range(3):
        shares = [(orders[:, row] == np.array(p)[None, :]).all(1).mean() for p in itertools.permutations(range(3))]
        np.testing.assert_allclose(shares, 1 / 6, atol=0.06)
    assert (orders[:, 0] != orders[:, 1]).any()


def test_pcgrad_of_two():
    g = np.array([[1.0, 0.2], [-1.5, 0.6]])
    weights, _ = call(balancer("pcgrad"), {}, jnp.ones(2), jnp.ones(2, bool), gram_of(g), KEY)
    inner, squares = g[0] @ g[1], (g**2).sum(1)
    np.testing.assert_allclose(weights, 1 - inner / squares, rtol=1e-5)
    assert inner < 0 and (g @ (np.asarray(weights) @ g) > 0).all()  # no conflict is left
    weights, _ = call(balancer("pcgrad"), {}, jnp.ones(2), jnp.ones(2, bool), gram_of(np.abs(g)), KEY)
    assert (weights == 1).all()


def simplex(function, slope, count):
    """The least value over the simplex by scipy, from several starts."""
    starts = [np.full(count, 1 / count), *np.random.default_rng(0).dirichlet(np.ones(count), 3)]
    sum_to_one = {"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(count)}
    options = {"maxiter": 1000, "ftol": 1e-14}
    found = [
        minimize(function, a, jac=slope, bounds=[(0, 1)] * count, constraints=sum_to_one, method="SLSQP", options=options)
        for a in starts
    ]
    return min(found, key=lambda r: r.fun)


# (gradients, dimensions, what they have in common, ratio of their lengths)
SHAPES = [(3, 10, 0.5, 1), (5, 3, 0.0, 1), (8, 30, 1.0, 10), (16, 40, 0.3, 1), (16, 8, 0.5, 1), (6, 20, 0.0, 100)]


def uneven(count, dim, common, ratio):
    g = gradients(count, count, dim, common)
    g *= ratio ** np.linspace(0, 1, count)[:, None]
    return g / np.linalg.norm(g, axis=1).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mgda_is_the_min_norm_point(shape):
    count, g = shape[0], uneven(*shape)
    gram = g @ g.T
    weights, _ = call(balancer("mgda"), {}, jnp.ones(count), jnp.ones(count, bool), gram_of(g), KEY)
    alpha = np.asarray(weights, np.float64) / count
    assert (alpha >= 0).all()
    # In units of the value: scipy stops at an absolute difference.
    unit = alpha @ gram @ alpha + 1e-6
    best = simplex(lambda a: a @ gram @ a / unit, lambda a: 2 * gram @ a / unit, count)
    assert alpha @ gram @ alpha / unit <= best.fun + 1e-3
    # No loss grows along it.
    assert (gram @ alpha).min() >= alpha @ gram @ alpha - 1e-3 * unit - 1e-6


@pytest.mark.parametrize("g", [[[1.0, 0], [0, 2]], [[1.0, 0], [3, 1]], [[3.0, 1], [1, 0]], [[1.0, 0], [-2, 0]]], ids=str)
def test_mgda_of_two_in_closed_form(g):
    g = np.array(g)
    first = np.clip((g[1] - g[0]) @ g[1] / ((g[0] - g[1]) @ (g[0] - g[1])), 0, 1)
    weights, _ = call(balancer("mgda"), {}, jnp.ones(2), jnp.ones(2, bool), gram_of(g), KEY)
    np.testing.assert_allclose(weights, [2 * first, 2 - 2 * first], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("c", [0.3, 0.9])
def test_cagrad_is_the_least_of_the_dual_and_the_best_of_the_primal(shape, c):
    count, g = shape[0], uneven(*shape)
    mean, gram = g.mean(0), g @ g.T
    radius = c * np.linalg.norm(mean)
    weights, _ = call(balancer("cagrad", c=c), {}, jnp.ones(count), jnp.ones(count, bool), gram_of(g), KEY)
    d = np.asarray(weights, np.float64) @ g / count
    np.testing.assert_allclose(np.linalg.norm(d - mean), radius, rtol=1e-3)
    dual = lambda a: (a @ gram.mean(1) + radius * np.sqrt(a @ gram @ a)) / radius**2
    slope = lambda a: (gram.mean(1) + radius * gram @ a / np.sqrt(max(a @ gram @ a, 1e-16))) / radius**2
    best = simplex(dual, slope, count).fun
    # No d does better than the least dual value, and ours is as good.
    np.testing.assert_allclose((g @ d).min() / radius**2, best, atol=2e-3)
    alpha = (np.asarray(weights, np.float64) - 1) / (weights - 1).sum()
    np.testing.assert_allclose(dual(alpha), best, atol=1e-3)


def test_cagrad_without_freedom_is_equal_weights():
    weights, _ = call(balancer("cagrad", c=0.0), {}, losses_of(), ALL, gram_of(gradients(dim=3, common=0)), KEY)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_imtl_projects_alike_on_all_and_is_the_published_form(seed):
    g = gradients(seed, count=4)
    weights, _ = balancer("imtl")({}, jnp.ones(4), jnp.ones(4, bool), gram_of(g), KEY)
    units = g / np.linalg.norm(g, axis=1)[:, None]
    projections = units @ (np.asarray(weights) @ g)
    np.testing.assert_allclose(projections / projections.mean(), 1, rtol=1e-3)
    differences, u = g[:1] - g[1:], units[:1] - units[1:]
    rest = g[0] @ u.T @ np.linalg.inv(differences @ u.T)
    np.testing.assert_allclose(weights, 4 * np.array([1 - rest.sum(), *rest]), rtol=2e-3, atol=2e-3)


def test_imtl_where_the_published_sum_would_point_uphill():
    """The third lies between the others and is far shorter: to project alike on it, its weight falls below 0."""
    units = np.array([[1.0, 0.5, 0], [1.0, -0.5, 0], [1.0, 0, 0.05]])
    units /= np.linalg.norm(units, axis=1)[:, None]
    raw = np.linalg.solve(units @ units.T, np.ones(3))
    short = int(np.argmin(raw))
    g = units * np.where(np.arange(3) == short, 0.01, 1.0)[:, None]
    assert (raw / np.linalg.norm(g, axis=1)).sum() < 0
    weights, _ = balancer("imtl")({}, jnp.ones(3), jnp.ones(3, bool), gram_of(g), KEY)
    projections = units @ (np.asarray(weights) @ g)
    assert (projections > 0).all()
    np.testing.assert_allclose(np.abs(weights).sum(), 6, rtol=1e-4)


@pytest.mark.parametrize("name", ["mgda", "imtl", "gradnorm"])
def test_identical_gradients_share(name):
    method = balancer(name)
    gram = gram_of(np.ones((4, 3)))
    weights, _ = call(method, method.init(4), jnp.ones(4), jnp.ones(4, bool), gram)
    np.testing.assert_allclose(weights, 1, atol=1e-3)


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nashmtl", {}, "'nashmtl'.*equal, uncertainty.*imtl"),
        ("dwa", {"temp": 1.0}, r"'dwa'.*\['temp'\].*temperature"),
        ("dwa", {"temperature": 0.0}, "temperature of DWA is above 0"),
        ("dwa", {"every": 5}, "DWA reads no gradients"),
        ("mgda", {"every": 0}, "every of MGDA"),
        ("mgda", {"every": 1.5}, "every of MGDA"),
        ("cagrad", {"c": -0.1}, "c of CAGrad is 0 or more"),
        ("gradnorm", {"alpha": -1.0}, "alpha of GradNorm"),
        ("gradnorm", {"rate": 0.0}, "rate of GradNorm"),
        ("uncertainty", {"rate": float("nan")}, "rate of Uncertainty"),
        ("uncertainty", {"most": 0.5}, "most of Uncertainty"),
        ("gls", {"least": 0.0}, "least of GLS"),
    ],
)
def test_what_makes_no_balancer(name, options, message):
    with pytest.raises(DeclarationError, match=message):
        balancer(name, **options)


@pytest.mark.parametrize("name", SEAM)
def test_gradients_that_are_missing(name):
    method = balancer(name)
    assert 1 < method.every <= 10
    for gram in (None, jnp.eye(4)):
        with pytest.raises(InputError, match=r"5 losses.*\(5, 5\)"):
            method(method.init(5), losses_of(), ALL, gram, KEY)
