"""Conformance of whatever combines granularities: fusions and heads share one table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mgjax.contracts import Features
from mgjax.fusion import ConcatFusion
from mgjax.heads import ClassificationHead

MODULES = {
    "concat": (ConcatFusion(6), lambda f: f.vector),
    "classification_head": (ClassificationHead(6), lambda f: f),
}
TABLE = pytest.mark.parametrize("name", MODULES)
WIDTHS = {"coarse": 3, "middle": 5, "fine": 4}


def parts(names=tuple(WIDTHS), batch=4):
    return {n: Features(jax.random.normal(jax.random.key(WIDTHS[n]), (batch, WIDTHS[n]))) for n in names}


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
    present = {"middle": jnp.array([True, False, True, False])}
    clean = read(module.apply(variables, given, present))
    spoiled = given | {"middle": Features(given["middle"].vector.at[1::2].set(garbage))}
    np.testing.assert_array_equal(read(module.apply(variables, spoiled, present)), clean)
    without = read(module.apply(variables, {k: v for k, v in given.items() if k != "middle"}))
    np.testing.assert_allclose(clean[1::2], without[1::2], rtol=1e-5, atol=1e-6)
    assert np.abs(clean[::2] - without[::2]).max() > 1e-3


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
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
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
