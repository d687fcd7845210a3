"""Layers: one table of conformance, then what each promises, then their use by other programs."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mgjax import ops
from mgjax.branches import ConvNet
from mgjax.errors import InputError
from mgjax.flops import count_flops
from mgjax.layers import (
    ACTIVATIONS,
    AttentionPool,
    Conv,
    ConvNeXtBlock,
    DepthwiseConv,
    DropPath,
    FeaturePyramid,
    InvertedResidual,
    LinearSeparable,
    MLPBlock,
    MultiHeadAttention,
    NestedConv,
    NestedDense,
    PatchEmbed,
    Projection,
    SeparableConv,
    SqueezeExcite,
    TokenSampling,
    TransformerBlock,
    XceptionBlock,
    activation,
)
from mgjax.train.mesh import make_mesh

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


MAP, TOKENS = normal(8, 6, 6, 8), normal(8, 5, 8)
THERE = jnp.arange(5)[None] < jnp.array([5, 4, 3, 2, 1, 5, 4, 3])[:, None]
# name → layer, its arrays, its further arguments.
LAYERS = {
    "conv": (Conv(4, norm="group", use_bias=True), (MAP,), dict(train=True)),
    "separable": (SeparableConv(4), (MAP,), dict(train=False)),
    "inverted_residual": (InvertedResidual(8, expansion=2), (MAP,), dict(train=False)),
    "inverted_residual_narrow": (
        InvertedResidual(4, expansion=1, stride=2, norm="none", use_bias=True, activation=activation("silu")),
        (MAP,),
        dict(train=True),
    ),
    "linear_separable": (LinearSeparable(4, stride=2), (MAP,), dict(train=False)),
    "xception_block": (XceptionBlock((4, 8), stride=2), (MAP,), dict(train=False)),
    "xception_block_same": (XceptionBlock((8, 8), norm="group", activation=activation("silu")), (MAP,), dict(train=True)),
    "convnext_block": (ConvNeXtBlock(5, layer_scale=1.0), (MAP,), dict(train=True)),
    "convnext_block_of_tokens": (ConvNeXtBlock(3, norm="none", layer_scale=0.0), (TOKENS,), dict(train=False)),
    "separable_1d": (SeparableConv(4, kernel=5, stride=2, dilation=2, padding="causal"), (TOKENS,), dict(train=False)),
    "depthwise": (DepthwiseConv(3, multiplier=2, padding="SAME", use_bias=True), (MAP,), {}),
    "projection": (Projection(4, activation=activation("silu")), (MAP,), dict(train=False)),
    "projection_1d": (Projection(4, norm="group"), (TOKENS,), dict(train=True)),
    "squeeze_excite": (SqueezeExcite(4), (MAP,), {}),
    "attention": (MultiHeadAttention(2), (MAP,), {}),
    "attention_across": (
        MultiHeadAttention(2, features=4),
        (MAP, normal(8, 5, 3), THERE),
        dict(call=lambda layer, x, context, there: layer(x, context, key_mask=there)),
    ),
    "attention_pool": (AttentionPool(2, queries=2), (TOKENS, THERE), dict(call=lambda layer, x, m: layer(x, mask=m))),
    "drop_path": (DropPath(0.5), (TOKENS,), dict(train=False)),
    "nested_dense": (NestedDense(16, 8), (TOKENS,), dict(width=4)),
    "nested_conv": (NestedConv(16, 8, stride=2), (MAP,), dict(width=4)),
    "pyramid": (
        FeaturePyramid(4),
        (MAP, normal(8, 3, 3, 5)),
        dict(call=lambda layer, fine, coarse: layer({"fine": fine, "coarse": coarse}, train=False)),
    ),
    "pyramid_both": (
        FeaturePyramid(4, "bidirectional", norm="group", activation=nn.relu),
        (MAP, normal(8, 4, 3, 5)),
        dict(call=lambda layer, fine, coarse: layer({"fine": fine, "coarse": coarse}, train=False)),
    ),
    "token_sampling": (TokenSampling(3), (TOKENS, THERE), dict(call=lambda layer, x, m: layer(x, mask=m).tokens)),
    "token_sampling_of_a_map": (TokenSampling(0.25, norm="none"), (MAP,), dict(call=lambda layer, x: layer(x).tokens)),
    "patch_embed": (PatchEmbed(4, patch=4), (MAP,), {}),
    "mlp_block": (MLPBlock(16), (TOKENS,), dict(train=True)),
    "transformer_block": (
        TransformerBlock(2),
        (TOKENS, THERE),
        dict(call=lambda layer, x, m: layer(x, mask=m, train=True)),
    ),
}
TABLE = pytest.mark.parametrize("name", LAYERS)


@functools.cache
def case(name, dtype=None):
    """variables, arrays, apply(variables, *arrays) of a row of the table."""
    layer, arrays, options = LAYERS[name]
    if dtype is not None and hasattr(layer, "dtype"):
        layer = layer.clone(dtype=dtype)
    options = dict(options)
    call = options.pop("call", lambda layer, *arrays: layer(*arrays, **options))
    apply = lambda variables, *arrays: layer.apply(variables, *arrays, method=call)
    return jax.jit(lambda *arrays: layer.init(KEY, *arrays, method=call))(*arrays), arrays, apply


def initialise(layer, *args, **kwargs):
    """`layer.init`, as one program: faster than its many operations one by one."""
    return jax.jit(lambda *args: layer.init(KEY, *args, **kwargs))(*args)


def total(tree):
    return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(tree))


@TABLE
def test_jit_is_eager_and_gradients_are_finite(name):
    variables, arrays, apply = case(name)
    floats = [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(params, *given):
        inputs = list(arrays)
        for i, value in zip(floats, given):
            inputs[i] = value
        return total(apply(variables | {"params": params}, *inputs))

    given = (variables.get("params", {}), *(arrays[i] for i in floats))
    np.testing.assert_allclose(jax.jit(loss)(*given), loss(*given), rtol=1e-4)
    grads = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=tuple(range(len(given)))))(*given))
    assert all(np.isfinite(g).all() for g in grads) and any(np.abs(g).max() > 0 for g in grads)


@TABLE
def test_bfloat16_computes_near_float32_with_float32_parameters(name):
    variables, arrays, apply = case(name)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    halved = [a.astype(jnp.bfloat16) if name == "drop_path" else a for a in arrays]
    rough = jax.tree.leaves(jax.jit(case(name, jnp.bfloat16)[2])(variables, *halved))
    for mine, exact in zip(rough, jax.tree.leaves(jax.jit(apply)(variables, *arrays))):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(np.float32), exact, atol=0.05 * np.abs(exact).max())


@TABLE
def test_vmap_and_a_sharded_batch_give_the_same(name):
    variables, arrays, apply = case(name)
    apply_jit = jax.jit(apply)
    want = jax.tree.leaves(apply_jit(variables, *arrays))
    split = [a.reshape(2, 4, *a.shape[1:]) for a in arrays]
    mapped = jax.tree.leaves(jax.jit(jax.vmap(apply, in_axes=(None, *(0 for _ in split))))(variables, *split))
    sharded = [jax.device_put(a, NamedSharding(make_mesh(), PartitionSpec("data"))) for a in arrays]
    assert len(sharded[0].devices()) == 8
    spread = jax.tree.leaves(apply_jit(variables, *sharded))
    for a, b, c in zip(want, mapped, spread):
        np.testing.assert_allclose(b.reshape(a.shape), a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(c, a, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["attention_across", "attention_pool", "transformer_block"])
def test_what_a_mask_hides_alters_neither_result_nor_gradient(name):
    variables, arrays, apply = case(name)
    there = arrays[-1]
    # A block answers at the places of masked tokens too; that means nothing.
    kept = lambda y: jnp.where(there[..., None], y, 0) if y.shape[:2] == there.shape else y
    loss = lambda params, *inputs: total(kept(apply({"params": params}, *inputs, there)))
    evaluate = jax.jit(jax.value_and_grad(loss, argnums=range(len(arrays))))

    def hiding(garbage):
        hide = lambda a: jnp.where(there[..., None], a, garbage) if a.shape[:2] == there.shape else a
        return evaluate(variables["params"], *map(hide, arrays[:-1]))

    want = jax.tree.leaves(hiding(0.0))
    assert np.abs(want[0]) > 0
    for garbage in (1e6, np.inf, np.nan):
        for a, b in zip(jax.tree.leaves(hiding(garbage)), want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_attention_is_softmax_of_scaled_products():
    layer, x = MultiHeadAttention(2), normal(3, 4, 6)
    mask = jax.random.bernoulli(KEY, 0.6, (3, 2, 4, 4)) | jnp.eye(4, dtype=bool)[None, None]
    variables = initialise(layer, x)
    p = jax.tree.map(np.asarray, variables["params"])
    project = lambda name: (x @ p[name]["kernel"] + p[name]["bias"][None, None]).reshape(3, 4, 2, 3)
    q, k, v = map(project, ("query", "key", "value"))
    scores = np.where(mask, np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(3), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = np.einsum("bhts,bshc->bthc", weights, v).reshape(3, 4, 6) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(layer.apply(variables, x, mask=mask), y, rtol=1e-4, atol=1e-5)


def test_a_map_attends_as_its_tokens_do():
    layer, x, context = MultiHeadAttention(2), normal(2, 3, 4, 8), normal(2, 2, 3, 5, seed=1)
    there = jax.random.bernoulli(KEY, 0.5, (2, 2, 3)).at[:, 0, 0].set(True)
    variables = initialise(layer, x, context)
    y = layer.apply(variables, x, context, key_mask=there)
    flat = layer.apply(variables, x.reshape(2, 12, 8), context.reshape(2, 6, 5), key_mask=there.reshape(2, 6))
    np.testing.assert_allclose(y.reshape(2, 12, 8), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_may_see_nothing_gives_0(dtype):
    layer, x = MultiHeadAttention(2, dtype=dtype), normal(2, 3, 4)
    variables = jax.tree.map(lambda p: p + 0.5, initialise(layer, x))  # biases as well
    mask = jnp.ones((2, 2, 3, 3), bool).at[0, :, 1].set(False).at[1, 0, 2].set(False)
    apply = jax.jit(lambda x, mask: layer.apply(variables, x, mask=mask).astype(jnp.float32))
    assert np.isfinite(jax.grad(lambda x: apply(x, mask).sum())(x)).all()
    y = apply(x, mask)
    assert (y[0, 1] == 0).all() and (y[0, 0] != 0).all() and (y[1, 2] != 0).all()
    # What one head may not see, another still does.
    alone = apply(x, mask.at[1, 0, 2].set(True))
    assert (alone[1, 2] != y[1, 2]).any()
    nothing = layer.apply(variables, x, normal(2, 5, 4), key_mask=jnp.zeros((2, 5), bool))
    assert (nothing == 0).all()


def test_the_softmax_is_in_float32_whatever_the_computation():
    layer = MultiHeadAttention(2, dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(lambda x: layer.init_with_output(KEY, x)[0])(normal(1, 3, 4)))
    exponentials = [line for line in jaxpr.splitlines() if " exp " in line]
    assert exponentials and all("f32" in line for line in exponentials)


def test_attention_says_what_is_wrong_with_its_arguments():
    x = normal(2, 3, 4)
    for layer, arguments, says in (
        (MultiHeadAttention(3), {}, "3 heads do not divide a width of 4"),
        (MultiHeadAttention(2), dict(key_mask=jnp.ones((2, 3))), "boolean.*float32"),
        (MultiHeadAttention(2), dict(key_mask=jnp.ones((2, 4), bool)), r"\(2, 4\).*\(2, 3\)"),
        (MultiHeadAttention(2), dict(mask=jnp.ones((3, 3), bool)), r"queries, keys.*\(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=says):
            layer.init(KEY, x, **arguments)


def test_attention_pool_does_not_care_for_order_and_gives_0_where_nothing_is():
    layer, x = AttentionPool(2, queries=3, features=4), normal(2, 5, 6)
    there = jnp.array([[True, True, True, False, True], [False] * 5])
    variables = jax.tree.map(lambda p: p + 0.1, initialise(layer, x))
    y = layer.apply(variables, x, mask=there)
    assert y.shape == (2, 12) and (y[1] == 0).all() and (y[0] != 0).all()
    np.testing.assert_allclose(y, layer.apply(variables, x[:, ::-1], mask=there[:, ::-1]), rtol=1e-5, atol=1e-6)
    assert layer.apply(variables, x.reshape(2, 5, 1, 6)).shape == (2, 12)


# ---------------------------------------------------------------------- parts of transformers


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean():
    layer, x = DropPath(0.25), 1.0 + normal(400, 2, 3) ** 2
    run = lambda seed: layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)})
    ratio = np.asarray(run(0) / x)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)
    assert set(np.round(ratio[:, 0, 0], 3)) == {np.float32(0), np.float32(1.333)} and 0.65 < (ratio[:, 0, 0] > 0).mean() < 0.85
    assert (run(0) == run(0)).all() and (run(0) != run(1)).any()
    assert (layer.apply({}, x, train=False) == x).all()
    # At rate 0 it draws nothing, so no rng is needed.
    assert (DropPath(0.0).apply({}, x, train=True) == x).all()


def test_patch_embedding_is_a_convolution_whose_stride_is_its_kernel():
    layer, x = PatchEmbed(5, patch=4), normal(2, 8, 12, 3)
    variables = initialise(layer, x)
    variables = {"params": variables["params"] | {"bias": normal(5)}}
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    conv = jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer.apply(variables, x), conv + bias[None, None, None], rtol=1e-4, atol=1e-5)
    odd = x[:, :7, :9]
    padded = jnp.pad(odd, ((0, 0), (0, 1), (0, 3), (0, 0)), mode="edge")
    np.testing.assert_allclose(layer.apply(variables, odd), layer.apply(variables, padded), rtol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "group", "batch", "none"])
def test_a_transformer_block_has_its_norm_by_argument(norm):
    x = normal(2, 3, 3, 8)
    block = TransformerBlock(2, norm=norm, activation=activation("relu"), drop_path=0.5, dropout=0.1)
    variables = initialise(block, x, train=False)
    assert ("batch_stats" in variables) == (norm == "batch")
    apply = jax.jit(lambda v: block.apply(v, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"]))
    y, _ = apply(variables)
    assert y.shape == x.shape and np.isfinite(y).all()


# ---------------------------------------------------------------------- blocks of published networks


def test_an_xception_block_has_nothing_between_its_convolutions_and_activates_before_them():
    block = XceptionBlock((4, 6), stride=2)
    variables = initialise(block, MAP, train=True)
    assert set(variables["params"]["separable1"]) == {"depthwise", "pointwise"}
    assert set(variables["params"]) == {"separable1", "separable2", "shortcut"}
    # An input below 0 reaches the result by the shortcut alone; without the first activation by both.
    dark = -jnp.abs(MAP)
    for preactivate in (True, False):
        way = block.clone(preactivate=preactivate)
        zero = jax.tree.map(jnp.zeros_like, variables["params"]["shortcut"])
        inner = variables | {"params": variables["params"] | {"shortcut": zero}}
        moved = way.apply(inner, dark, train=False) - way.apply(inner, 2 * dark, train=False)
        assert (np.abs(moved).max() > 1e-3) != preactivate
    # Both paddings halve the map; where its side is even their windows begin elsewhere.
    for side in (6, 5):
        x = MAP[:, :side, :side]
        same, symmetric = (block.clone(padding=p).apply(variables, x, train=False) for p in ("SAME", "symmetric"))
        assert same.shape == symmetric.shape == (8, 3, 3, 6)
        assert bool((same == symmetric).all()) == (side == 5)


def test_a_convnext_block_starts_as_nearly_nothing_and_is_left_out_example_by_example():
    block = ConvNeXtBlock()
    variables = initialise(block, MAP, train=False)
    np.testing.assert_allclose(variables["params"]["scale"], np.full(8, 1e-6), rtol=1e-6)
    np.testing.assert_allclose(block.apply(variables, MAP, train=False), MAP, atol=1e-4)
    assert "scale" not in ConvNeXtBlock(layer_scale=0.0).init(KEY, MAP, train=False)["params"]
    dropping = ConvNeXtBlock(layer_scale=1.0, drop_path=0.5)
    variables = initialise(dropping, MAP, train=False)
    moved = dropping.apply(variables, MAP, train=True, rngs={"dropout": KEY}) - MAP
    whole = dropping.apply(variables, MAP, train=False) - MAP
    kept = (np.abs(moved).max((1, 2, 3)) > 0)[:, None, None, None]
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(moved, np.where(kept, 2 * whole, 0), rtol=1e-3, atol=1e-5)


def test_blocks_say_what_is_wrong():
    for block, says in (
        (XceptionBlock(()), "widths"),
        (XceptionBlock((4,), padding="VALID"), "'SAME' or 'symmetric'.*'VALID'"),
        (ConvNeXtBlock(norm="nrom"), "nrom"),
    ):
        with pytest.raises(InputError, match=says):
            block.init(KEY, MAP, train=False)


# ---------------------------------------------------------------------- nested widths


@pytest.mark.parametrize("layer, x", [(NestedDense(16, 12), normal(4, 16)), (NestedConv(16, 12), normal(4, 5, 5, 16))])
def test_narrow_widths_are_prefixes_and_cost_less(layer, x):
    variables = initialise(layer, x)
    narrow = jax.eval_shape(lambda: layer.init(KEY, x[..., :2], width=1))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, narrow)
    variables = {"params": variables["params"] | {"bias": normal(12)}}
    full = layer.apply(variables, x)
    np.testing.assert_allclose(layer.apply(variables, x, width=3), full[..., :3], rtol=1e-5, atol=1e-6)
    few = layer.apply(variables, x[..., :4])
    np.testing.assert_allclose(few, layer.apply(variables, x.at[..., 4:].set(0)), rtol=1e-5, atol=1e-6)
    flops = lambda x, **width: count_flops(lambda v, x: layer.apply(v, x, **width), variables, x).matmul
    assert flops(x) > 0
    assert flops(x, width=3) * 4 == flops(x) and flops(x[..., :4]) * 4 == flops(x)
    assert flops(x[..., :4], width=3) * 16 == flops(x)


@pytest.mark.parametrize("width, inputs", [(0, 8), (5, 8), (4, 9)])
def test_widths_that_a_nested_layer_does_not_have(width, inputs):
    for layer, x in ((NestedDense(8, 4), jnp.ones((1, inputs))), (NestedConv(8, 4), jnp.ones((1, 3, 3, inputs)))):
        with pytest.raises(ValueError, match=f"8 inputs and 4 outputs was given {inputs}.*{width} outputs"):
            layer.init(KEY, x, width=width)


# ---------------------------------------------------------------------- pyramids

MAPS = {"b": normal(1, 7, 5, 3), "c": normal(1, 2, 2, 6), "a": normal(1, 7, 5, 4), "fine": normal(1, 12, 12, 2)}


@pytest.mark.parametrize("direction", ["top_down", "bidirectional"])
def test_a_pyramid_of_a_subset_is_a_sub_tree_and_order_does_not_matter(direction):
    layer = FeaturePyramid(8, direction)
    variables = initialise(layer, MAPS, train=False)
    out = jax.jit(lambda maps: layer.apply(variables, maps, train=False))(MAPS)
    assert {n: m.shape for n, m in out.items()} == {n: (*m.shape[:3], 8) for n, m in MAPS.items()}
    turned = layer.apply(variables, dict(reversed(MAPS.items())), train=False)
    for n in MAPS:
        np.testing.assert_allclose(turned[n], out[n], rtol=1e-4, atol=1e-5)
    for left in MAPS:
        subset = {n: m for n, m in MAPS.items() if n != left}
        of_subset = jax.eval_shape(lambda s=subset: layer.init(KEY, s, train=False))["params"]
        assert set(of_subset) == {n for n in variables["params"] if not n.endswith("_" + left)}
        part = {n: variables["params"][n] for n in of_subset}
        assert jax.tree.map(jnp.shape, part) == jax.tree.map(jnp.shape, of_subset)
        answer = jax.eval_shape(lambda p=part, s=subset: layer.apply({"params": p}, s, train=False))
        assert set(answer) == set(subset)


@pytest.mark.parametrize("direction", ["top_down", "bidirectional"])
def test_a_map_that_is_absent_is_as_if_it_were_not_there(direction):
    maps = {"fine": normal(2, 8, 8, 3), "middle": normal(2, 4, 4, 2), "coarse": normal(2, 2, 2, 5)}
    layer = FeaturePyramid(4, direction)
    variables = jax.tree.map(lambda p: p + 0.1, initialise(layer, maps, train=False))
    apply = jax.jit(lambda v, maps, present: layer.apply(v, maps, present, train=False))
    for absent in maps:
        present = {absent: jnp.array([True, False])}
        given = maps | {absent: maps[absent].at[1].set(jnp.nan)}
        some = apply(variables, given, present)
        others = {n: m for n, m in maps.items() if n != absent}
        full, without = apply(variables, maps, {}), apply(variables, others, {})
        for n in others:
            np.testing.assert_allclose(some[n][0], full[n][0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(some[n][1], without[n][1], rtol=1e-4, atol=1e-5)
        loss = lambda v, g=given, p=present, o=others: sum((apply(v, g, p)[n] ** 2).sum() for n in o)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(variables)))


def test_what_sees_what_in_a_pyramid():
    def depends(direction):
        layer = FeaturePyramid(4, direction)
        variables = initialise(layer, MAPS, train=False)
        apply = jax.jit(lambda maps: layer.apply(variables, maps, train=False))
        plain = apply(MAPS)
        result = {}
        for name in MAPS:
            other = apply(MAPS | {name: MAPS[name] + 1})
            result[name] = "".join(sorted(n[0] for n in MAPS if (other[n] != plain[n]).any()))
        return result

    # From the coarsest (c) by way of b and a, of one size and so by name, to the finest.
    assert depends("top_down") == {"c": "abcf", "b": "abf", "a": "af", "fine": "f"}
    assert set(depends("bidirectional").values()) == {"abcf"}


def test_a_pyramid_says_what_is_wrong():
    for layer, maps, says in (
        (FeaturePyramid(4, "sideways"), MAPS, "top_down or bidirectional, not 'sideways'"),
        (FeaturePyramid(4), {}, "needs maps"),
        (FeaturePyramid(4), {"a": jnp.ones((2, 3))}, r"'a': \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=says):
            layer.init(KEY, maps, train=False)


# ---------------------------------------------------------------------- the others


def test_squeeze_and_excitation_gates_channels_by_the_mean_of_the_map():
    layer = SqueezeExcite(4)
    variables = initialise(layer, MAP)
    p = variables["params"]
    assert p["squeeze"]["kernel"].shape == (8, 2)
    mean = MAP.mean((1, 2))
    gate = nn.sigmoid(nn.relu(mean @ p["squeeze"]["kernel"]) @ p["excite"]["kernel"])
    np.testing.assert_allclose(layer.apply(variables, MAP), MAP * gate[:, None, None], rtol=1e-4, atol=1e-5)
    # Channels fewer than the ratio still have one in the bottleneck.
    assert SqueezeExcite(16).init(KEY, MAP)["params"]["squeeze"]["kernel"].shape == (8, 1)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_pointwise_projection_is_the_same_over_map_tokens_and_vector(norm):
    layer = Projection(4, kernel=1, norm=norm)
    variables = initialise(layer, MAP, train=False)
    assert set(variables["params"]) == {"pointwise"}
    assert variables["params"]["pointwise"]["dense"]["kernel"].shape == (8, 4)
    assert ("bias" in variables["params"]["pointwise"]["dense"]) == (norm == "none")
    y = layer.apply(variables, MAP, train=False)
    for shape in ((8, 36), (288,)):
        flat = layer.apply(variables, MAP.reshape(*shape, 8), train=False)
        np.testing.assert_allclose(flat, y.reshape(*shape, 4), rtol=1e-5, atol=1e-6)


def test_a_projection_is_a_separable_convolution_of_maps_and_tokens_and_linear_of_vectors():
    layer = Projection(4, norm="none", activation=None)
    for x, kernel in ((MAP, (3, 3, 1, 8)), (TOKENS, (3, 1, 8))):
        params = initialise(layer, x, train=False)["params"]
        assert params["depthwise"]["kernel"].shape == kernel and params["depthwise"]["bias"].shape == (8,)
        y = layer.apply({"params": params}, x, train=False)
        between = ops.depthwise_conv(x, params["depthwise"]["kernel"], padding=((1, 1),) * (x.ndim - 2))
        np.testing.assert_allclose(y, between @ params["pointwise"]["dense"]["kernel"], rtol=1e-4, atol=1e-5)
    vector = initialise(layer, MAP[:, 0, 0], train=False)["params"]
    assert set(vector) == {"pointwise"}


@pytest.mark.parametrize(
    "layer, says",
    [
        (Conv(4, padding="causal"), r"padding 'causal' is none of \('symmetric', 'same', 'valid'\)"),
        (DepthwiseConv(padding="sane"), "padding 'sane' is none of .*'causal'"),
        (InvertedResidual(4, expansion=0.01), "expansion of 0.01 leaves nothing of 8 channels"),
    ],
)
def test_convolutions_say_what_is_wrong(layer, says):
    arguments = {} if isinstance(layer, DepthwiseConv) else dict(train=False)
    with pytest.raises(InputError, match=says):
        layer.init(KEY, MAP, **arguments)


def test_a_convolution_takes_bias_and_epsilon_by_argument():
    with_bias = Conv(4, norm="none", activation=None, use_bias=True)
    variables = with_bias.init(KEY, MAP, train=False)
    moved = {"params": {"conv": variables["params"]["conv"] | {"bias": jnp.arange(4.0)}}}
    difference = with_bias.apply(moved, MAP, train=False) - with_bias.apply(variables, MAP, train=False)
    np.testing.assert_allclose(difference, np.broadcast_to(np.arange(4.0), difference.shape), atol=1e-5)
    assert "bias" not in Conv(4).init(KEY, MAP, train=False)["params"]["conv"]
    # A variance of 1 + 3: halved.
    layers = Conv(4, activation=None, epsilon=3.0), Conv(4, activation=None, epsilon=0.0)
    variables = layers[0].init(KEY, MAP, train=False)
    y = [layer.apply(variables, MAP, train=False) for layer in layers]
    np.testing.assert_allclose(2 * y[0], y[1], rtol=1e-5, atol=1e-6)


def test_activations_have_names():
    x = jnp.linspace(-3, 3, 13)
    for name in ACTIVATIONS:
        assert activation(name) is activation(name)
        assert activation(name)(x).shape == x.shape and hash(activation(name)) is not None
    exact = 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2)))
    np.testing.assert_allclose(activation("gelu")(x), exact, rtol=1e-5, atol=1e-6)
    assert np.abs(activation("gelu_tanh")(x) - exact).max() > 1e-5
    assert (activation("identity")(x) == x).all()
    with pytest.raises(InputError, match="'gelu_tahn'; did you mean 'gelu_tanh'"):
        activation("gelu_tahn")


# ---------------------------------------------------------------------- in other programs

LABELS = jnp.arange(8) % 4


def mean_loss(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def test_a_layer_trains_in_a_plain_jax_program():
    layer = MultiHeadAttention(heads=2)
    variables = {"layer": layer.init(KEY, TOKENS), "out": 0.1 * normal(8, 4)}

    @jax.jit
    def step(variables):
        loss = lambda v: mean_loss(layer.apply(v["layer"], TOKENS, key_mask=THERE).mean(1) @ v["out"])
        value, grads = jax.value_and_grad(loss)(variables)
        return jax.tree.map(lambda p, g: p - 0.5 * g, variables, grads), value

    losses = []
    for _ in range(10):
        variables, value = step(variables)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


class WithBridge(nnx.Module):
    """A layer with batch statistics, and a dense layer of nnx."""

    def __init__(self, images, rngs):
        self.conv = nnx.bridge.ToNNX(SeparableConv(8), rngs=rngs)
        self.conv.lazy_init(images, train=False)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images, train):
        return self.out(self.conv(images, train=train, mutable=["batch_stats"]).mean((1, 2)))


def test_an_nnx_model_trains_a_layer_and_its_batch_statistics_move():
    model = WithBridge(MAP, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: mean_loss(model(MAP, train=True)))(model)
        optimizer.update(model, grads)
        return value

    copy = lambda kind: jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(model, kind)))
    stats, params = copy(nnx.BatchStat), copy(nnx.Param)
    assert len(jax.tree.leaves(stats)) == 4
    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    for before, after in ((stats, copy(nnx.BatchStat)), (params, copy(nnx.Param))):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(moved)), moved

    # Flax refuses to lose what it would have to keep.
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        model.conv(MAP, train=True)
    # In evaluation they stay, and are used.
    stats = copy(nnx.BatchStat)
    evaluated = model(MAP, train=False)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stats, copy(nnx.BatchStat)))
    assert np.abs(evaluated - model(MAP, train=True)).max() > 1e-4


def test_a_linen_model_uses_layers_and_a_branch():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            maps = ConvNet((8, 16), norm="group")(images, taps=("stage1", "stage2"), train=train)
            maps = FeaturePyramid(8)({tap: f.map for tap, f in maps.items()}, train=train)
            return nn.Dense(4)(AttentionPool(heads=2)(maps["stage1"]))

    model = Classifier()
    variables = initialise(model, MAP, train=False)
    tx = optax.adam(0.01)
    state = tx.init(variables)

    @jax.jit
    def step(variables, state):
        value, grads = jax.value_and_grad(lambda v: mean_loss(model.apply(v, MAP, train=True)))(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    losses = []
    for _ in range(15):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
