"""Sampling of tokens: what is kept, what it costs, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgjax.errors import InputError
from mgjax.flops import count_flops
from mgjax.layers import AttentionPool, MLPBlock, TokenSampling
from mgjax.train.mesh import make_mesh, replicated

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 12, 6))
IMAGE = jax.random.normal(jax.random.key(1), (8, 3, 4, 6))


def test_a_score_that_is_no_number_is_still_before_what_is_masked():
    x = X[:1, :6].at[0, 0].set(jnp.nan)
    there = jnp.arange(6)[None] < 3
    layer = TokenSampling(3)
    sampled = layer.apply(layer.init(KEY, x), x, mask=there)
    assert sampled.positions.tolist() == [[0, 1, 2]] and sampled.mask.all()
    assert TokenSampling(np.float32(0.5)).init_with_output(KEY, x)[0].positions.shape == (1, 3)


def made(layer, x=X, **arguments):
    """Variables with a bias, so that nothing masked gives 0 by chance."""
    params = layer.init(KEY, x, **arguments)["params"]
    return {"params": params | {"score": params["score"] | {"bias": jnp.array([0.3])}}}


def scores_of(layer, variables, x):
    """In numpy."""
    x = np.asarray(x, np.float64)
    if layer.norm == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    score = variables["params"]["score"]
    return (x @ np.asarray(score["kernel"]) + np.asarray(score["bias"]))[..., 0]


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_the_highest_scores_are_kept_in_order_and_gated(norm):
    layer = TokenSampling(5, norm=norm)
    variables = made(layer)
    scores = scores_of(layer, variables, X)
    sampled = jax.jit(layer.apply)(variables, X)
    want = np.sort(np.argsort(-scores, 1)[:, :5], 1)
    assert sampled.positions.dtype == jnp.int32 and (sampled.positions == want).all()
    assert sampled.mask.dtype == jnp.bool_ and sampled.mask.shape == (8, 5) and sampled.mask.all()
    gated = X * (1 / (1 + np.exp(-scores)))[..., None]
    np.testing.assert_allclose(sampled.tokens, np.take_along_axis(gated, want[..., None], 1), rtol=1e-4, atol=1e-5)


def test_a_map_is_its_tokens_row_by_row():
    layer = TokenSampling(0.5)
    variables = made(layer, IMAGE)
    there = jax.random.bernoulli(KEY, 0.7, (8, 3, 4))
    of_map, of_tokens = (
        layer.apply(variables, x, mask=m) for x, m in ((IMAGE, there), (IMAGE.reshape(8, 12, 6), there.reshape(8, 12)))
    )
    for a, b in zip(of_map, of_tokens):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "keep, length, kept", [(1, 7, 1), (7, 7, 7), (1.0, 7, 7), (0.5, 7, 4), (0.1, 30, 3), (1e-9, 7, 1), (0.7, 10, 7)]
)
def test_a_share_is_rounded_up(keep, length, kept):
    said = jax.eval_shape(lambda: TokenSampling(keep).init_with_output(KEY, jnp.ones((2, length, 3)))[0])
    assert said.tokens.shape == (2, kept, 3) and said.positions.shape == said.mask.shape == (2, kept)


def test_of_equal_scores_the_first_position_wins():
    x = jnp.ones((2, 9, 6)).at[1, 4:].set(2 * jnp.arange(6.0))
    layer = TokenSampling(3)
    sampled = layer.apply(made(layer), x)
    assert sampled.positions[0].tolist() == [0, 1, 2]
    assert sampled.positions[1].tolist() in ([0, 1, 2], [4, 5, 6])


def test_order_does_not_matter():
    layer = TokenSampling(5)
    variables = made(layer)
    order = jax.random.permutation(KEY, 12)
    before, after = layer.apply(variables, X), layer.apply(variables, X[:, order])
    original = np.asarray(order)[np.asarray(after.positions)]
    assert (np.sort(original, 1) == before.positions).all()
    sorted_ = np.take_along_axis(np.asarray(after.tokens), np.argsort(original, 1)[..., None], 1)
    np.testing.assert_allclose(sorted_, before.tokens, rtol=1e-5, atol=1e-6)


def test_what_is_not_kept_alters_neither_result_nor_gradient():
    layer = TokenSampling(4)
    variables = made(layer)
    sampled = layer.apply(variables, X)
    kept = (jnp.arange(12)[None, :, None] == sampled.positions[:, None]).any(-1)
    worst = jnp.take_along_axis(X, jnp.argmin(scores_of(layer, variables, X), 1)[:, None, None], 1)
    changed = jnp.where(kept[..., None], X, worst)
    loss = lambda v, x: (layer.apply(v, x).tokens ** 2).sum()
    assert (changed != X).any()
    for a, b in zip(layer.apply(variables, changed), sampled):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    of_params, of_x = jax.grad(loss, argnums=(0, 1))(variables, X)
    assert (of_x[~kept] == 0).all() and (np.abs(of_x[kept]).max(-1) > 0).all()
    for a, b in zip(jax.tree.leaves(jax.grad(loss)(variables, changed)), jax.tree.leaves(of_params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_scorer_and_are_those_of_finite_differences():
    layer = TokenSampling(4)
    variables = made(layer)
    loss = jax.jit(lambda v: (layer.apply(v, X).tokens ** 2).sum())
    grads = jax.grad(loss)(variables)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))
    length = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    # A step so small keeps the same tokens.
    moved = [loss(jax.tree.map(lambda p, g, s=s: p + s * g / length, variables, grads)) for s in (1e-3, -1e-3)]
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, length, rtol=1e-2)


@pytest.mark.parametrize("garbage", [1e6, np.inf, np.nan])
def test_masked_tokens_are_kept_last_and_contribute_nothing(garbage):
    layer = TokenSampling(4)
    there = jnp.arange(12)[None] >= jnp.array([0, 3, 6, 8, 9, 10, 11, 12])[:, None]  # so many are masked
    variables = made(layer)

    def evaluate(hidden):
        x = jnp.where(there[..., None], X, hidden)
        loss = lambda v, x: ((layer.apply(v, x, mask=there).tokens) ** 2).sum()
        return layer.apply(variables, x, mask=there), jax.grad(loss, argnums=(0, 1))(variables, x)

    (clean, clean_grads), (dirty, dirty_grads) = evaluate(0.0), evaluate(garbage)
    for a, b in zip(jax.tree.leaves((clean, clean_grads)), jax.tree.leaves((dirty, dirty_grads))):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)
    assert (dirty.mask.sum(1) == jnp.minimum(there.sum(1), 4)).all()
    assert (dirty.mask == jnp.take_along_axis(there, dirty.positions, 1)).all()
    assert (dirty.tokens[~dirty.mask] == 0).all() and (np.abs(dirty.tokens[dirty.mask]).max(-1) > 0).all()
    assert (np.diff(dirty.positions, axis=1) > 0).all()


@pytest.mark.parametrize("keep", [2, 4, 8])
def test_a_block_behind_it_costs_in_proportion_to_what_is_kept(keep):
    sampling, block = TokenSampling(keep), MLPBlock(24)
    variables = made(sampling), block.init(KEY, X, train=False)

    def both(variables, x):
        return block.apply(variables[1], sampling.apply(variables[0], x).tokens, train=False)

    score = 2 * 8 * 12 * 6
    whole = count_flops(lambda v, x: block.apply(v, x, train=False), variables[1], X).matmul
    assert count_flops(both, variables, X).matmul == score + whole * keep // 12
    # Backwards as well: a gradient of the parameters and one of the tokens.
    grad = jax.grad(lambda v, x: (both(v, x) ** 2).sum(), argnums=(0, 1))
    assert count_flops(grad, variables, X).matmul == 3 * (score + whole * keep // 12)


def test_scores_are_in_float32_whatever_the_computation():
    exact, rough = TokenSampling(5), TokenSampling(5, dtype=jnp.bfloat16)
    variables = made(exact)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    halved = X.astype(jnp.bfloat16)
    a, b = rough.apply(variables, halved), exact.apply(variables, halved.astype(jnp.float32))
    assert a.tokens.dtype == jnp.bfloat16 and (a.positions == b.positions).all()
    np.testing.assert_array_equal(a.tokens, b.tokens.astype(jnp.bfloat16))


def test_vmap_over_batches_gives_the_same():
    layer = TokenSampling(5)
    variables, there = made(layer), jax.random.bernoulli(KEY, 0.6, (8, 12))
    want = layer.apply(variables, X, mask=there)
    mapped = jax.vmap(lambda x, m: layer.apply(variables, x, mask=m))(X.reshape(2, 4, 12, 6), there.reshape(2, 4, 12))
    for a, b in zip(want, mapped):
        np.testing.assert_allclose(b.reshape(a.shape), a, rtol=1e-5, atol=1e-6)


def test_a_batch_over_devices_is_sampled_where_it_lies():
    mesh = make_mesh()
    layer, pool = TokenSampling(5), AttentionPool(2)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.tile(X, (2, 1, 1)), spread)
    there = jax.device_put(jax.random.bernoulli(KEY, 0.6, x.shape[:2]), spread)
    assert len(x.devices()) == 8
    variables = jax.device_put((made(layer), pool.init(KEY, X)), replicated(mesh))

    def forward(variables, x, there):
        sampled = layer.apply(variables[0], x, mask=there)
        return pool.apply(variables[1], sampled.tokens, mask=sampled.mask), sampled

    backward = jax.grad(lambda v, x, m: (forward(v, x, m)[0] ** 2).sum(), argnums=(0, 1))
    for fn, reduces in ((forward, False), (backward, True)):
        compiled = jax.jit(fn).lower(variables, x, there).compile().as_text()
        assert not any(f in compiled for f in ("all-gather", "all-to-all", "collective-permute"))
        # The gradient of the parameters is summed over the devices; nothing else is sent.
        assert ("all-reduce" in compiled) == reduces
    assert not jax.jit(forward)(variables, x, there)[1].tokens.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "layer, arguments, says",
    [
        (TokenSampling(13), {}, r"13 tokens.*12 of \(8, 12, 6\)"),
        (TokenSampling(0), {}, "0 tokens"),
        (TokenSampling(-1), {}, "-1 tokens"),
        (TokenSampling(0.0), {}, r"\(0, 1\], not 0.0"),
        (TokenSampling(1.5), {}, r"\(0, 1\], not 1.5"),
        (TokenSampling(float("nan")), {}, "nan"),
        (TokenSampling(2, norm="batch"), {}, "'batch'"),
        (TokenSampling(2), dict(x=jnp.ones((3, 4))), r"tokens.*\(3, 4\)"),
        (TokenSampling(2), dict(mask=jnp.ones((8, 12))), "bool.*float32"),
        (TokenSampling(2), dict(mask=jnp.ones((8, 11), bool)), r"\(8, 12\), not bool \(8, 11\)"),
        (TokenSampling(1.0), dict(x=jnp.ones((2, 0, 3))), "1 tokens.*0 of"),
    ],
)
def test_bad_input_is_named(layer, arguments, says):
    arguments = {"x": X} | arguments
    with pytest.raises(InputError, match=says):
        layer.init(KEY, arguments.pop("x"), **arguments)
