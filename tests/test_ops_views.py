import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgjax import ops
from mgjax.flops import count_flops
from mgjax.granularity import Identity, Resize
from mgjax.layers import SeparableConv
from mgjax.views import apply_view


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 3),
    multiplier=st.integers(1, 2),
    padding=st.sampled_from(["SAME", ((2, 1), (3, 4))]),
)
def test_shifted_depthwise_convolution_is_laxs(size, kernel, strides, channels, multiplier, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, channels)).astype(np.float32)
    weights = rng.normal(size=(*kernel, 1, channels * multiplier)).astype(np.float32)
    results = [ops.depthwise_conv(x, weights, strides=strides, padding=padding, impl=i) for i in ("xla", "shift")]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_depthwise_gradients_agree():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    weights = jax.random.normal(jax.random.key(1), (3, 3, 1, 3))
    grad = lambda impl: jax.grad(lambda x, w: (ops.depthwise_conv(x, w, strides=(2, 1), impl=impl) ** 2).sum(), argnums=(0, 1))(
        x, weights
    )
    for a, b in zip(grad("xla"), grad("shift")):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x, kernel, options, says",
    [
        ((1, 4, 4, 2), (3, 3, 2, 2), {}, r"\(1, 4, 4, 2\) and \(3, 3, 2, 2\)"),
        ((1, 4, 4, 2), (3, 3, 1, 3), {}, r"\(3, 3, 1, 3\)"),
        ((1, 2, 2, 2), (3, 3, 1, 2), {"padding": "VALID", "impl": "shift"}, "larger than the padded input"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"impl": "magic"}, "magic"),
    ],
)
def test_depthwise_bad_input(x, kernel, options, says):
    with pytest.raises(ValueError, match=says):
        ops.depthwise_conv(jnp.ones(x), jnp.ones(kernel), **options)


def test_depthwise_refuses_integers():
    with pytest.raises(ValueError, match="int32"):
        ops.depthwise_conv(jnp.ones((1, 4, 4, 2), jnp.int32), jnp.ones((3, 3, 1, 2)))


def test_separable_conv_counts_its_parameters():
    variables = SeparableConv(8, stride=2).init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=True)
    # depthwise 9·4, norm 2·4, pointwise 4·8, norm 2·8
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == 36 + 8 + 32 + 16


def test_crop_flip_and_space_to_depth_by_hand():
    x = jnp.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    cut = ops.crop(x, jnp.array([0, 2]), jnp.array([1, 0]), 2, 3)
    np.testing.assert_array_equal(cut[0], x[0, 0:2, 1:4])
    np.testing.assert_array_equal(cut[1], x[1, 2:4, 0:3])
    turned = ops.flip(x, jnp.array([True, False]))
    np.testing.assert_array_equal(turned[0], x[0, :, ::-1])
    np.testing.assert_array_equal(turned[1], x[1])
    deep = ops.space_to_depth(x, 2)
    np.testing.assert_array_equal(deep[0, 0, 1], x[0, 0:2, 2:4].ravel())
    with pytest.raises(ValueError, match="does not divide"):
        ops.space_to_depth(x[:, :3], 2)


def test_resize_keeps_means_and_is_exact_for_whole_blocks():
    x = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    np.testing.assert_allclose(ops.resize(x, 3, 3), x.reshape(2, 3, 4, 3, 4, 3).mean((2, 4)), rtol=1e-6)
    assert ops.resize(x, 9, 9).shape == (2, 9, 9, 3)
    np.testing.assert_allclose(ops.resize(jnp.ones((1, 12, 12, 1)), 9, 9), 1.0, rtol=1e-5)


def test_views():
    image = jnp.ones((2, 32, 32, 3))
    assert apply_view({"image": image}, Identity()).shape == (2, 32, 32, 3)
    assert apply_view({"image": image}, Resize(0.25)).shape == (2, 8, 8, 3)
    assert apply_view({"image": image}, Resize(0.5), 0.75).shape == (2, 12, 12, 3)
    noise = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    blurred = apply_view({"image": noise}, Resize(1.0, detail=0.25))
    assert blurred.shape == noise.shape
    np.testing.assert_allclose(blurred, ops.resize(ops.resize(noise, 8, 8), 32, 32), rtol=1e-6)
    assert set(apply_view({"text": image}, Identity())) == {"text"}
    with pytest.raises(ValueError, match="needs an image"):
        apply_view({"text": image}, Resize(0.5))
    with pytest.raises(ValueError, match="uint8"):
        apply_view({"image": image.astype(jnp.uint8)}, Identity())


def test_flops_of_loops_conditionals_and_calls():
    a = jnp.ones((4, 4))
    assert count_flops(lambda a: a @ a, a).matmul == 2 * 4**3
    looped = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=5)[0]
    assert count_flops(jax.jit(looped), a).matmul == 5 * 2 * 4**3
    either = lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a)
    assert count_flops(either, a).matmul == 2 * 2 * 4**3
    assert count_flops(lambda a: jnp.exp(a) + a, a).elementwise == 2 * 16


def test_flops_of_a_convolution_and_its_gradients():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert count_flops(conv, x, w).matmul == forward
    both = count_flops(jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1)), x, w).matmul
    # The gradients cost about as much each (borders differ a little); the forward pass is dead code.
    assert 2 * forward <= both <= 3.3 * forward
