"""Conformance of every branch: one table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgjax.branches import MLP, ResNet, SeparableNet
from mgjax.flops import count_flops
from mgjax.train.state import make_mesh

SMALL = {
    "resnet_cifar": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar"),
    "resnet_patch": ResNet(blocks=(1, 1), widths=(4, 8), stem="patch", downsample="pool"),
    "resnet_imagenet": ResNet(blocks=(1, 1), widths=(4, 8), kind="bottleneck", stem="imagenet", norm="group"),
    "separable": SeparableNet(widths=(4, 8), blocks=1),
    "mlp": MLP(16 * 16 * 3, (8, 4)),
}
TABLE = pytest.mark.parametrize("name", SMALL)


def images(batch=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, 16, 16, 3))


def initialise(branch, x, taps):
    return branch.init(jax.random.key(0), x, taps=taps, train=False)


@TABLE
def test_every_tap_is_what_feature_info_promises(name):
    branch, x = SMALL[name], images()
    taps = tuple(branch.feature_info)
    features, _ = jax.eval_shape(lambda: branch.init_with_output(jax.random.key(0), x, taps=taps, train=False))
    for tap, info in branch.feature_info.items():
        assert features[tap].vector.shape == (8, info.channels)
        if info.reduction is None:
            assert features[tap].map is None
        else:
            assert features[tap].map.shape == (8, 16 // info.reduction, 16 // info.reduction, info.channels)


@TABLE
def test_jit_is_eager_and_gradients_are_finite(name):
    branch, x = SMALL[name], images()
    taps = (list(branch.feature_info)[-1],)
    variables = initialise(branch, x, taps)
    stats = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        features, _ = branch.apply({"params": params, **stats}, x, taps=taps, train=True, mutable=["batch_stats"])
        return (features[taps[0]].vector ** 2).sum()

    np.testing.assert_allclose(jax.jit(loss)(variables["params"]), loss(variables["params"]), rtol=1e-4)
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@TABLE
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    branch, x = SMALL[name], images()
    taps = (list(branch.feature_info)[-1],)
    variables = initialise(branch, x, taps)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    exact = branch.apply(variables, x, taps=taps, train=False)[taps[0]].vector
    rough = branch.clone(dtype=jnp.bfloat16).apply(variables, x, taps=taps, train=False)[taps[0]].vector
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


@TABLE
def test_a_batch_sharded_over_devices_gives_the_same(name):
    branch, x = SMALL[name], images()
    taps = (list(branch.feature_info)[-1],)
    variables = initialise(branch, x, taps)
    apply = jax.jit(lambda v, x: branch.apply(v, x, taps=taps, train=True, mutable=["batch_stats"])[0][taps[0]].vector)
    sharded = jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec("data")))
    assert len(sharded.devices()) == 8
    np.testing.assert_allclose(apply(variables, sharded), apply(variables, x), rtol=2e-4, atol=2e-5)


@TABLE
def test_rows_do_not_touch_each_other_in_evaluation(name):
    branch, x = SMALL[name], images()
    taps = (list(branch.feature_info)[-1],)
    variables = initialise(branch, x, taps)
    both = branch.apply(variables, x.at[4:].set(1e3), taps=taps, train=False)[taps[0]].vector
    alone = branch.apply(variables, x, taps=taps, train=False)[taps[0]].vector
    np.testing.assert_allclose(both[:4], alone[:4], rtol=1e-5, atol=1e-6)


@TABLE
def test_what_lies_below_the_deepest_tap_is_not_traced(name):
    branch, x = SMALL[name], images()
    taps = tuple(branch.feature_info)
    variables = initialise(branch, x, taps)
    cost = [
        count_flops(lambda v, t=t: branch.apply(v, x, taps=(t,), train=True, mutable=["batch_stats"])[0], variables).total
        for t in taps
    ]
    assert cost == sorted(cost) and len(set(cost)) == len(cost)


@pytest.mark.parametrize("name, published", [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032)])
def test_published_parameter_counts_without_the_classifier(name, published):
    branch = ResNet.named(name)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 64, 64, 3)), ("stage4",)))
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == published


def test_flops_of_resnet50_are_the_published_ones():
    branch = ResNet.named("resnet50")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 64, 64, 3)), ("stage4",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("stage4",), train=False), variables, x).matmul
    # 4.089 G multiply-adds with the classifier of 2,048 × 1,000 (torchvision's figure for v1.5).
    assert abs(counted / 2 + 2048 * 1000 - 4.089e9) < 2e6


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: initialise(SMALL["separable"], images(), ("stage9",)), "taps.*stage9.*it has.*stem"),
        (lambda: initialise(SMALL["separable"], images(), ()), "taps"),
        (lambda: initialise(SMALL["separable"], jnp.ones((2, 5)), ("stem",)), "images"),
        (lambda: initialise(SMALL["resnet_patch"], jnp.ones((1, 2, 2, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: initialise(SMALL["mlp"], jnp.ones((2, 5)), ("input",)), "got 5 numbers"),
        (lambda: ResNet.named("resnet1000"), "resnet1000.*resnet18"),
        (lambda: initialise(SMALL["separable"].clone(norm="nrom"), images(), ("stem",)), "nrom"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
