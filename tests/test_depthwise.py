"""The depthwise convolution: all implementations are lax's in float64, under every transformation of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from mgjax import ops
from mgjax.errors import InputError
from mgjax.flops import count_flops
from mgjax.ops import depthwise_conv
from mgjax.train.mesh import make_mesh

IMPLEMENTATIONS = ("xla", "shift", "pallas")
EACH = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
# A map and a sequence with a stride, a dilation and a multiplier each; sizes that 8 devices divide.
CASES = {
    "map": ((8, 6, 5, 8), (3, 3, 1, 8), {}),
    "strided": ((8, 7, 6, 8), (3, 2, 1, 16), dict(strides=(2, 3), padding=((1, 0), (2, 1)))),
    "dilated": ((8, 6, 6, 8), (3, 3, 1, 8), dict(dilation=2, padding="VALID")),
    "causal": ((8, 9, 8), (3, 1, 16), dict(padding="causal", dilation=2)),
    "strided sequence": ((8, 9, 8), (4, 1, 8), dict(strides=3)),
}
# Rules of differentiation and mapping do not look at the implementation; interpreted kernels are slow to compile.
PAIRS = pytest.mark.parametrize(
    "impl, case", [(impl, case) for impl in IMPLEMENTATIONS for case in (CASES if impl == "shift" else ("strided", "causal"))]
)


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def of(case, impl, dtype=np.float32):
    """f, x, kernel, and a tangent of each."""
    x, kernel, how = CASES[case]
    arrays = [jnp.asarray(normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate((x, kernel, x, kernel))]
    return functools.partial(depthwise_conv, impl=impl, **how), *arrays


def of_lax(case):
    """The same by lax alone."""
    how = CASES[case][2]
    axes = len(CASES[case][0]) - 2
    both = lambda name: (how.get(name, 1),) * axes if isinstance(how.get(name, 1), int) else how[name]
    padding = how.get("padding", "SAME")
    if padding == "causal":
        padding = (((CASES[case][1][0] - 1) * how["dilation"], 0),)
    return functools.partial(lax_conv, strides=both("strides"), padding=padding, dilation=both("dilation"))


def lax_conv(x, kernel, *, strides, padding, dilation):
    one = x.ndim == 3
    names = ("NLC", "LIO", "NLC") if one else ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=tuple(n.replace("L", "H") for n in names),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


@st.composite
def convolutions(draw):
    axes = draw(st.sampled_from([1, 2, 2]))
    pairs = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))
    size, window, strides, dilation = pairs(1, 7), pairs(1, 5), pairs(1, 3), pairs(1, 3)
    padding = draw(st.sampled_from(["SAME", "VALID", "CAUSAL", "explicit"]))
    pads = tuple((draw(st.integers(-1, 4)), draw(st.integers(-1, 4))) for _ in range(axes))
    channels, multiplier, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    if padding == "CAUSAL":
        window = tuple(k - 1 + k % 2 for k in window)
    explicit = tuple(((k - 1) * d, 0) for k, d in zip(window, dilation)) if padding == "CAUSAL" else pads
    mine, laxs = (padding, padding) if padding in ("SAME", "VALID") else (pads, pads)
    if padding == "CAUSAL":
        mine, laxs = "CAUSAL", explicit
    return (batch, *size, channels), (*window, 1, channels * multiplier), strides, dilation, mine, laxs


@settings(max_examples=20, deadline=None, derandomize=True)
@given(convolutions())
@example(((2, 6, 7, 2), (3, 3, 1, 4), (2, 2), (2, 2), "SAME", "SAME"))
@example(((1, 7, 6, 3), (3, 2, 1, 3), (1, 2), (1, 1), "VALID", "VALID"))
@example(((2, 9, 8, 1), (2, 3, 1, 2), (3, 3), (1, 3), ((-1, 2), (3, 4)), ((-1, 2), (3, 4))))
@example(((2, 11, 2), (5, 1, 4), (2,), (2,), "CAUSAL", ((8, 0),)))
@example(((0, 5, 5, 2), (3, 3, 1, 4), (2, 1), (1, 1), "SAME", "SAME"))
@EACH
def test_values_and_gradients_are_laxs(impl, convolution):
    x_shape, k_shape, strides, dilation, mine, laxs = convolution
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(normal(*x_shape)), jnp.asarray(normal(*k_shape, seed=1))
        want = jax.eval_shape(lambda x, k: lax_conv(x, k, strides=strides, padding=laxs, dilation=dilation), x, kernel)
        f = lambda x, k: depthwise_conv(x, k, strides=strides, padding=mine, dilation=dilation, impl=impl)
        if min(want.shape[1:-1]) < 1:
            with pytest.raises(InputError, match="more than the padded input"):
                f(x, kernel)
            return
        g = jnp.asarray(normal(*want.shape, seed=2))
        both = lambda f: jax.jit(lambda x, k: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x, k)))
        laxs_own = both(lambda x, k: lax_conv(x, k, strides=strides, padding=laxs, dilation=dilation))
        for a, b in zip(both(f)(x, kernel), laxs_own(x, kernel)):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "size, window, strides, dilation, pads",
    [
        ((12, 10), (9, 9), (1, 1), (1, 1), ((4, 4), (4, 4))),
        ((3, 40), (2, 67), (1, 1), (1, 1), ((1, 0), (33, 33))),
        ((20, 12), (11, 9), (2, 1), (1, 2), ((4, 4), (8, 8))),
        ((200,), (131,), (1,), (1,), ((130, 0),)),
        ((9, 9), (2, 2), (3, 3), (1, 1), ((0, 0), (-1, 1))),  # pixels that no window sees
    ],
)
def test_large_windows_and_pixels_between_windows(size, window, strides, dilation, pads):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(normal(2, *size, 2)), jnp.asarray(normal(*window, 1, 2, seed=1))
        results = []
        for f in (lax_conv, functools.partial(depthwise_conv, impl="shift")):
            f = functools.partial(f, strides=strides, padding=pads, dilation=dilation)
            results.append(jax.jit(lambda x, k, f=f: (lambda y, pull: (y, *pull(y)))(*jax.vjp(f, x, k)))(x, kernel))
        for a, b in zip(*results):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-10)


# ---------------------------------------------------------------------- transformations


@PAIRS
def test_every_implementation_is_xlas_in_float32_and_bfloat16(impl, case):
    for dtype, tolerance in ((np.float32, 1e-5), (jnp.bfloat16, 0.02)):
        f, x, kernel, *_ = of(case, impl, dtype)
        y = jax.jit(f)(x, kernel)
        exact = of_lax(case)(x.astype(np.float32), kernel.astype(np.float32))
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(np.float32), exact, rtol=tolerance, atol=tolerance * np.abs(exact).max())


@PAIRS
def test_first_and_second_derivatives_forward_and_backward(impl, case):
    f, x, kernel, dx, dk = of(case, impl)
    loss = lambda x, k: (f(x, k) ** 3).sum()
    reference = lambda x, k: (of_lax(case)(x, k) ** 3).sum()

    def derivatives(loss):
        gradient = lambda x, k: jax.grad(loss, argnums=(0, 1))(x, k)
        forward = jax.jvp(gradient, (x, kernel), (dx, dk))  # forward over reverse
        along = lambda x, k: sum((g * t).sum() for g, t in zip(gradient(x, k), (dx, dk)))
        reverse = jax.grad(along, argnums=(0, 1))(x, kernel)  # reverse over reverse
        twice = jax.jvp(lambda x, k: jax.jvp(loss, (x, k), (dx, dk))[1], (x, kernel), (dx, dk))  # forward over forward
        return forward, reverse, twice

    mine, xlas = jax.jit(lambda: derivatives(loss))(), jax.jit(lambda: derivatives(reference))()
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(xlas)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    # The two ways to a Hessian-vector product meet.
    for a, b in zip(mine[0][1], mine[1]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@PAIRS
def test_vmap_over_maps_kernels_and_both(impl, case):
    f, x, kernel, other_x, other_k = of(case, impl)
    g = jnp.ones(jax.eval_shape(f, x, kernel).shape)
    pull = lambda x, k, g: jax.vjp(f, x, k)[1](g)
    xs, ks, gs = jnp.stack([x, other_x], 1), jnp.stack([kernel, other_k], 2), jnp.stack([g, 2 * g])
    pick = lambda a, axis, i: a if axis is None else jnp.take(a, i, axis)
    one_by_one = jax.jit(lambda x, k, g: (f(x, k), *pull(x, k, g)))
    for axes in ((1, None, None), (None, 2, None), (None, None, 0), (1, 2, 0), (1, None, 0)):
        args = [a if axis is not None else one for a, one, axis in zip((xs, ks, gs), (x, kernel, g), axes)]
        got = jax.jit(jax.vmap(lambda x, k, g: (f(x, k), *pull(x, k, g)), axes))(*args)
        for i in range(2):
            mine = [pick(a, axis, i) for a, axis in zip(args, axes)]
            for a, b in zip(got, one_by_one(*mine)):
                np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


@EACH
def test_remat_recomputes_it_and_eager_is_jit(impl):
    f, x, kernel, *_ = of("map", impl)
    block = lambda x, k: jax.nn.relu(f(x, k)) ** 2
    plain, again = (jax.grad(lambda x, k, g=g: g(x, k).sum(), argnums=(0, 1)) for g in (block, jax.checkpoint(block)))
    # Once more forward, besides once forward and two gradients.
    assert count_flops(again, x, kernel).matmul * 3 == count_flops(plain, x, kernel).matmul * 4
    for a, b, c in zip(plain(x, kernel), again(x, kernel), jax.jit(plain)(x, kernel)):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-5)


@EACH
def test_nothing_is_as_much_as_any_batch(impl):
    f, x, kernel, *_ = of("strided", impl)
    y, pull = jax.vjp(f, x[:0], kernel)
    of_x, of_kernel = pull(y)
    assert y.shape == (0, *jax.eval_shape(f, x, kernel).shape[1:]) and of_x.shape == x[:0].shape
    np.testing.assert_array_equal(of_kernel, np.zeros_like(kernel))
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [jnp.zeros((0, *a.shape)) if axis == 0 else a for a, axis in zip((x, kernel), axes)]
        for mapped in (f, jax.grad(lambda x, k: f(x, k).sum(), argnums=1)):
            one = jax.eval_shape(mapped, x, kernel).shape
            assert jax.vmap(mapped, axes)(*args).shape == (0, *one)


def test_without_jit():
    f, x, kernel, *_ = of("map", "auto")
    with jax.disable_jit():
        got = jax.grad(lambda k: f(x, k).sum())(kernel)
    np.testing.assert_allclose(got, jax.jit(jax.grad(lambda k: f(x, k).sum()))(kernel), rtol=1e-4, atol=1e-4)


def test_several_kernels_for_one_map_do_not_repeat_the_map():
    f, x, kernel, *_ = of("map", "auto")
    mapped = jax.make_jaxpr(jax.vmap(f, (None, 0)))(x, jnp.stack([kernel] * 5))
    assert max(v.aval.size for e in mapped.eqns for v in e.invars if e.primitive.name == "depthwise_convolve") == x.size


def test_precision_is_that_of_where_it_is_called():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))

    def f(x, kernel):
        with jax.default_matmul_precision("highest"):
            return depthwise_conv(x, kernel, impl="xla")

    for g in (f, lambda x, k: jax.vjp(f, x, k)[1](x)):
        text = jax.jit(g).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
        assert "HIGHEST" in text and "DEFAULT" not in text


def test_strides_of_many_phases_are_left_to_xla():
    x, kernel = jnp.ones((1, 32, 32, 2)), jnp.ones((16, 16, 1, 2))
    text = lambda strides: jax.jit(functools.partial(depthwise_conv, strides=strides)).lower(x, kernel).as_text()
    assert "stablehlo.convolution" in text(16) and "stablehlo.convolution" not in text(4)


# ---------------------------------------------------------------------- several devices


GATHERS = ("all-gather", "all-to-all", "collective-permute")


@pytest.mark.parametrize("case", ["map", "strided", "causal"])
@pytest.mark.parametrize("axis", [0, -1])
@EACH
def test_sharded_over_batch_or_channels_nothing_is_gathered(impl, axis, case):
    f, x, kernel, *_ = of(case, impl)
    mesh = make_mesh()
    over = lambda a, axis: NamedSharding(mesh, PartitionSpec(*("data" if i == axis % a.ndim else None for i in range(a.ndim))))
    shardings = over(x, axis), over(kernel, axis) if axis else NamedSharding(mesh, PartitionSpec())
    g = jnp.asarray(normal(*jax.eval_shape(f, x, kernel).shape, dtype=np.float32))
    run = jax.jit(
        lambda x, k, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x, k)),
        in_shardings=(*shardings, over(g, axis)),
        out_shardings=(over(g, axis), *shardings),
    )
    compiled = run.lower(x, kernel, g).compile()
    assert not any(word in compiled.as_text() for word in GATHERS)
    # Gradients of kernels are summed over the shards of a batch, once, and over channels not at all.
    assert compiled.as_text().count(" all-reduce(") == (0 if axis else 1)
    one = jax.jit(lambda x, k, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x, k)))(x, kernel, g)
    for a, b in zip(compiled(*(jax.device_put(a, s) for a, s in zip((x, kernel, g), (*shardings, over(g, axis))))), one):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@EACH
def test_inside_of_shard_map(impl):
    f, x, kernel, *_ = of("map", impl)
    loss = lambda x, k: (f(x, k) ** 2).sum()
    mapped = jax.shard_map(
        lambda x, k: jax.lax.psum(loss(x, k), "data"),
        mesh=make_mesh(),
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    for a, b in zip(jax.jit(jax.grad(mapped, argnums=(0, 1)))(x, kernel), jax.grad(loss, argnums=(0, 1))(x, kernel)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- what else it promises


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # jax 0.12 says so
@pytest.mark.parametrize("case", ["strided", "causal"])
def test_kernels_are_lowered_for_a_gpu_without_one(case, dtype):
    f, x, kernel, *_ = of(case, "pallas", dtype)
    grads = jax.jit(lambda x, k: jax.vjp(f, x, k)[1](f(x, k)))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    types = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), axis_types=types, abstract_device=device)):
        text = grads.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("depthwise_convolve") and "depthwise_input_gradient" in text and "depthwise_kernel_gradient" in text


def test_flops_are_those_of_the_windows():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 1, 8))
    for impl in ("auto", *IMPLEMENTATIONS):
        f = functools.partial(depthwise_conv, strides=2, impl=impl)
        assert count_flops(f, x, kernel).matmul == 2 * 9 * 2 * 4 * 4 * 8
        grads = count_flops(lambda x, k, f=f: jax.vjp(f, x, k)[1](jnp.ones((2, 4, 4, 8))), x, kernel)
        assert grads.matmul == 3 * 2 * 9 * 2 * 4 * 4 * 8


def test_a_wider_kernel_makes_a_wider_result():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2))
    assert depthwise_conv(x, kernel).dtype == jnp.float32


def test_causal_outputs_do_not_see_what_comes_after():
    x, kernel = jnp.asarray(normal(1, 9, 2)), jnp.asarray(normal(3, 1, 2))
    f = lambda x: depthwise_conv(x, kernel, padding="causal", dilation=2)
    np.testing.assert_array_equal(f(x)[:, :5], f(x.at[:, 5:].set(1e3))[:, :5])
    np.testing.assert_allclose(f(x)[:, 0], x[:, 0] * kernel[2], rtol=1e-5)


@pytest.mark.parametrize(
    "x, kernel, options, says",
    [
        ((1, 4, 4, 2), (3, 3, 2, 2), {}, r"\(1, 4, 4, 2\), kernel \(3, 3, 2, 2\)"),
        ((1, 4, 4, 2), (3, 1, 2), {}, r"\(1, 4, 4, 2\), kernel \(3, 1, 2\)"),
        ((4, 2), (3, 2), {}, r"\(4, 2\)"),
        ((1, 4, 4, 2), (3, 3, 1, 3), {}, r"3 channels of the kernel are no multiple of the 2.*\(3, 3, 1, 3\)"),
        ((1, 2, 2, 2), (3, 3, 1, 2), {"padding": "VALID"}, r"\(3, 3\), more than the padded input \(2, 2\).*\(1, 2, 2, 2\)"),
        ((1, 4, 2), (3, 1, 2), {"padding": "VALID", "dilation": 2}, r"\(5,\), more than the padded input \(4,\)"),
        ((1, 4, 2), (4, 1, 2), {"padding": "causal"}, r"odd size.*kernel \(4, 1, 2\).*padding=\(\(3, 0\),\)"),
        ((1, 4, 2), (0, 1, 2), {}, r"kernel \(0, 1, 2\)"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"padding": ((0.7, 0.7), (1, 1))}, r"0.7.*\(before, after\)"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"padding": "sane"}, "sane.*none of SAME"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"padding": ((1, 1),)}, r"\(before, after\) of 2 axes"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"strides": (1, 0)}, r"strides \(1, 0\)"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"strides": 1.5}, r"strides 1.5 .*2 whole numbers.*kernel \(3, 3, 1, 2\)"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"dilation": (1, 1, 1)}, "dilation.*2 whole numbers"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"impl": "magic"}, "shift.*magic"),
    ],
)
def test_bad_input_is_named(x, kernel, options, says):
    with pytest.raises(InputError, match=says):
        ops.depthwise_conv(jnp.ones(x), jnp.ones(kernel), **options)


@pytest.mark.parametrize("which", ["x", "kernel"])
def test_integers_are_refused(which):
    arrays = dict(x=jnp.ones((1, 4, 4, 2)), kernel=jnp.ones((3, 3, 1, 2)))
    arrays[which] = arrays[which].astype(jnp.int32)
    with pytest.raises(InputError, match=rf"floating {which}, not int32.*\(1, 4, 4, 2\)"):
        depthwise_conv(**arrays)
