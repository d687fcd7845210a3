"""Conformance of whatever combines granularities: fusions and heads share one table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mgjax.contracts import Features
from mgjax.fusion import FUSIONS
from mgjax.heads import ClassificationHead
from mgjax.train.mesh import batch_sharding, make_mesh

# A smooth activation, so that every parameter has a gradient.
MODULES = {name: (fusion(8, nn.gelu), lambda f: f.vector) for name, fusion in FUSIONS.items()}
MODULES["classification_head"] = (ClassificationHead(6), lambda f: f)
TABLE = pytest.mark.parametrize("name", MODULES)
WIDTHS = {"coarse": 3, "middle": 5, "fine": 4}
SIDES = {"coarse": 2, "middle": 0, "fine": 4}  # the middle one is a vector alone


def part(name, batch=4):
    rng = jax.random.key(WIDTHS[name])
    if not SIDES[name]:
        return Features(jax.random.normal(rng, (batch, WIDTHS[name])))
    seen = jax.random.normal(rng, (batch, SIDES[name], SIDES[name], WIDTHS[name]))
    return Features(seen.mean((1, 2)), seen)


def parts(names=tuple(WIDTHS), batch=4):
    return {n: part(n, batch) for n in names}


@TABLE
def test_parameters_of_a_subset_are_a_subtree(name):
    module, _ = MODULES[name]
    full = flatten_dict(module.init(jax.random.key(0), parts())["params"])
    for subset in (("fine",), ("coarse", "fine")):
        some = flatten_dict(module.init(jax.random.key(0), parts(subset))["params"])
        assert {k: v.shape for k, v in some.items()}.items() < {k: v.shape for k, v in full.items()}.items()


@TABLE
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_what_is_absent_cannot_alter_the_output(name, garbage):
    module, read = MODULES[name]
    given = parts()
    variables = module.init(jax.random.key(0), given)
    for absent in WIDTHS:
        present = {absent: jnp.array([True, False, True, False])}
        clean = read(module.apply(variables, given, present))
        spoiled = given | {absent: jax.tree.map(lambda x: x.at[1::2].set(garbage), given[absent])}
        np.testing.assert_array_equal(read(module.apply(variables, spoiled, present)), clean)
        # It is the same whether an example lacks a granularity or the operating point does.
        without = read(module.apply(variables, {k: v for k, v in given.items() if k != absent}))
        np.testing.assert_allclose(clean[1::2], without[1::2], rtol=1e-5, atol=1e-5)
        assert np.abs(clean[::2] - without[::2]).max() > 1e-3
        slope = jax.grad(lambda g, p=present: (read(module.apply(variables, g, p)) ** 2).sum())(spoiled)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
        assert not np.abs(slope[absent].vector[1::2]).any()


@TABLE
def test_where_nothing_is_present_the_output_is_finite(name):
    module, read = MODULES[name]
    given = parts()
    variables = module.init(jax.random.key(0), given)
    nothing = {n: jnp.zeros(4, bool) for n in WIDTHS}
    first, second = (read(module.apply(variables, jax.tree.map(lambda x, f=f: x * f, given), nothing)) for f in (1, 2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)


@TABLE
def test_one_granularity_alone_can_be_fused(name):
    module, read = MODULES[name]
    for only in WIDTHS:
        answer = read(module.init_with_output(jax.random.key(0), parts((only,)))[0])
        assert np.isfinite(answer).all() and np.abs(answer).max() > 1e-3


@TABLE
def test_a_batch_sharded_over_devices_gives_the_same(name):
    module, read = MODULES[name]
    given = parts(batch=8)
    variables = module.init(jax.random.key(0), given)
    apply = jax.jit(lambda v, g, p: read(module.apply(v, g, p)))
    sharding = batch_sharding(make_mesh())
    present = {"fine": jnp.arange(8) % 3 > 0}
    spread = jax.device_put((given, present), sharding)
    assert len(spread[0]["fine"].vector.devices()) == 8
    np.testing.assert_allclose(apply(variables, *spread), apply(variables, given, present), rtol=1e-5, atol=1e-5)


@TABLE
def test_order_of_declaration_changes_nothing(name):
    module, read = MODULES[name]
    given = parts()
    variables = module.init(jax.random.key(0), given)
    turned = dict(reversed(given.items()))
    np.testing.assert_array_equal(read(module.apply(variables, given)), read(module.apply(variables, turned)))
    again = module.init(jax.random.key(0), turned)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


@TABLE
def test_jit_is_eager_gradients_are_finite_and_vmap_is_batching(name):
    module, read = MODULES[name]
    given = parts()
    variables = module.init(jax.random.key(0), given)
    apply = lambda v, g: read(module.apply(v, g))
    np.testing.assert_allclose(jax.jit(apply)(variables, given), apply(variables, given), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda v: (apply(v, given) ** 2).sum())(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    # A bias of the keys moves all scores alike.
    still = {path[-2:] for path, g in flatten_dict(grads).items() if not np.abs(g).max() > 0}
    assert still <= {("key", "bias")}
    single = jax.tree.map(lambda x: x[:, None], given)
    np.testing.assert_allclose(
        jax.vmap(apply, (None, 0))(variables, single)[:, 0], apply(variables, given), rtol=1e-5, atol=1e-6
    )


@TABLE
def test_bfloat16_is_near_float32(name):
    module, read = MODULES[name]
    given = parts()
    variables = module.init(jax.random.key(0), given)
    exact, rough = (read(m.apply(variables, given)) for m in (module, module.clone(dtype=jnp.bfloat16)))
    np.testing.assert_allclose(rough.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


def test_heads_drop_inputs_in_training_alone():
    head, given = ClassificationHead(6, dropout=0.5), parts()
    variables = head.init(jax.random.key(0), given)
    train = lambda seed: head.apply(variables, given, train=True, rngs={"dropout": jax.random.key(seed)})
    assert np.abs(train(0) - train(1)).max() > 1e-3
    np.testing.assert_array_equal(head.apply(variables, given), ClassificationHead(6).apply(variables, given))


@TABLE
def test_nothing_to_read_is_an_error(name):
    with pytest.raises(ValueError, match="at least one source"):
        MODULES[name][0].init(jax.random.key(0), {})
