"""Conformance of every branch: one table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgjax import ops
from mgjax.branches import MLP, NAMED_BRANCHES, VGG, ConvNet, ResNet, SeparableNet, ViT
from mgjax.branches.vgg import adaptive_means
from mgjax.flops import count_flops
from mgjax.layers import activation
from mgjax.train.mesh import make_mesh

SMALL = {
    "resnet_cifar": ResNet(blocks=(1, 1), widths=(4, 8), stem="cifar"),
    "resnet_patch": ResNet(blocks=(1, 1), widths=(4, 8), stem="patch", downsample="pool"),
    "resnet_imagenet": ResNet(blocks=(1, 1), widths=(4, 8), kind="bottleneck", stem="imagenet", norm="group"),
    "separable": SeparableNet(widths=(4, 8), blocks=1),
    "mlp": MLP(16 * 16 * 3, (8, 4)),
    "vgg": VGG(blocks=(1, 2), widths=(4, 8), activation=activation("silu")),
    "vgg_bn_classifier": VGG(blocks=(1, 1), widths=(4, 8), norm="batch", classifier=True, classifier_width=8, dropout=0.0),
    "vit_cls": ViT(features=8, depth=1, heads=2, patch=4, image_size=16),
    "vit_mean_resampled": ViT(features=8, depth=1, heads=2, patch=4, image_size=(8, 24), pool="mean"),
    "vit_hybrid": ViT(
        features=8, depth=1, heads=2, patch=1, image_size=16, stem="resnet", stem_options=dict(blocks=(1, 1), widths=(4, 4))
    ),
    "convnet": ConvNet((4, 8), blocks=(1, 2), pool="mean", norm="none"),
    "convnet_patch": ConvNet((4, 8), stem="patch"),
}
TABLE = pytest.mark.parametrize("name", SMALL)


def images(batch=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, 16, 16, 3))


def initialise(branch, x, taps):
    # As one program: faster than its many operations one by one.
    return jax.jit(lambda x: branch.init(jax.random.key(0), x, taps=taps, train=False))(x)


def evaluate(branch, variables, x, tap):
    """The Features at one tap, in evaluation."""
    return jax.jit(lambda v, x: branch.apply(v, x, taps=(tap,), train=False)[tap])(variables, x)


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
    tap = list(branch.feature_info)[-1]
    variables = initialise(branch, x, (tap,))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    exact = evaluate(branch, variables, x, tap).vector
    rough = evaluate(branch.clone(dtype=jnp.bfloat16), variables, x, tap).vector
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
    tap = list(branch.feature_info)[-1]
    variables = initialise(branch, x, (tap,))
    both = evaluate(branch, variables, x.at[4:].set(1e3), tap).vector
    alone = evaluate(branch, variables, x, tap).vector
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


# As torchvision (ResNet, VGG) and timm (ViT, patches of 16) count them: with the last dense layer for
# 1,000 classes, which is a head's and no part of a branch.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "vit_ti": 5_717_416,
    "vit_s": 22_050_664,
    "vit_b": 86_567_656,
}


def shapes(branch, size=224):
    """Shapes of the parameters, and the number of them."""
    deepest = tuple(branch.feature_info)[-1:]
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, size, size, 3)), deepest))
    return variables["params"], sum(p.size for p in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    branch = NAMED_BRANCHES[name](**dict(classifier=True) if name.startswith("vgg") else {})
    classifier = 1000 * list(branch.feature_info.values())[-1].channels + 1000
    assert shapes(branch)[1] + classifier == PUBLISHED[name]


def test_parameter_counts_of_vision_transformers_do_not_depend_on_what_they_see():
    assert shapes(ViT.named("vit_b", patch=32))[1] == 88_224_232 - 769_000
    assert shapes(ViT.named("vit_s"), size=160)[1] == 21_665_664
    # Without a CLS token: the token and its position.
    assert shapes(ViT.named("vit_ti", pool="mean"))[1] == 5_524_416 - 2 * 192


@pytest.mark.parametrize("name", NAMED_BRANCHES)
def test_every_named_branch_has_a_width_multiplier(name):
    full, half = NAMED_BRANCHES[name](), NAMED_BRANCHES[name](width=0.5)
    for tap, info in full.feature_info.items():
        assert half.feature_info[tap].channels == info.channels // 2
    third = NAMED_BRANCHES[name](width=0.3, **dict(classifier=True) if name.startswith("vgg") else {})
    multiple = third.heads if isinstance(third, ViT) else 8
    assert all(info.channels % multiple == 0 for info in third.feature_info.values())


def test_a_hybrid_scales_its_residual_network_and_takes_other_options():
    params, _ = shapes(ViT.named("vit_s_hybrid", width=0.5, depth=1, stem_options=dict(blocks=(1, 1, 1), stem="cifar")))
    # The stem begins with a 3×3 convolution, its last map has 4 · 128 channels.
    assert params["stem"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, 32)
    assert params["embed"]["kernel"].shape == (1, 1, 512, 192) and params["position"].shape == (1, 56**2 + 1, 192)
    whole = ViT.named("vit_b_hybrid")
    assert whole.feature_info["final"].reduction == 16 and len(whole.feature_info) == 14
    assert shapes(whole)[0]["stem"]["stage3_block9"]["conv3"]["conv"]["kernel"].shape == (1, 1, 256, 1024)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_vgg_sees_small_images(norm):
    branch, x = VGG.named("vgg11", width=0.125, norm=norm), jnp.ones((2, 32, 32, 3))
    features, _ = jax.eval_shape(
        lambda: branch.init_with_output(jax.random.key(0), x, taps=tuple(branch.feature_info), train=False)
    )
    assert features["stage5"].map.shape == (2, 1, 1, 64)


def test_dropout_of_vgg_is_drawn_in_training_only():
    branch, x = SMALL["vgg_bn_classifier"].clone(dropout=0.5, norm="none", classifier_width=64), images()
    variables = initialise(branch, x, ("fc2",))
    train = jax.jit(lambda key: branch.apply(variables, x, taps=("fc2",), train=True, rngs={"dropout": key})["fc2"].vector)
    assert (train(jax.random.key(0)) != train(jax.random.key(1))).any()
    without = evaluate(branch.clone(dropout=0.0), variables, x, "fc2").vector
    assert (evaluate(branch, variables, x, "fc2").vector == without).all()


@pytest.mark.parametrize("size", [(2, 2), (7, 7), (14, 7), (9, 11)])
def test_adaptive_means_are_those_of_their_windows(size, rng):
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    edges = [[(i * s // 7, -(-(i + 1) * s // 7)) for i in range(7)] for s in size]
    want = np.stack([np.stack([x[:, a:b, c:d].mean((1, 2)) for c, d in edges[1]], 1) for a, b in edges[0]], 1)
    np.testing.assert_allclose(adaptive_means(jnp.asarray(x), 7, 7), want, rtol=1e-5, atol=1e-6)


def test_positions_of_a_vision_transformer_are_resampled_to_the_image():
    x = images()
    declared = ViT(features=8, depth=1, heads=2, patch=4, image_size=24)
    variables = initialise(declared, x, ("final",))
    position = variables["params"]["position"]
    grid = ops.resize(position[:, 1:].reshape(1, 6, 6, 8), 4, 4).reshape(1, 16, 8)
    of_this_size = {"params": variables["params"] | {"position": jnp.concatenate([position[:, :1], grid], 1)}}
    for tap in ("embed", "final"):
        there = evaluate(declared, variables, x, tap)
        here = evaluate(declared.clone(image_size=16), of_this_size, x, tap)
        np.testing.assert_allclose(there.map, here.map, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(there.vector, here.vector, rtol=1e-5, atol=1e-6)
    # A side that is no multiple of the patch repeats its last pixels.
    assert evaluate(declared, variables, x[:, :15, :13], "final").map.shape == (8, 4, 4, 8)


def test_the_vector_of_a_vision_transformer_is_its_cls_token_or_the_mean():
    x = images()
    cls, mean = SMALL["vit_cls"], SMALL["vit_mean_resampled"]
    for branch, tap, is_mean in ((cls, "embed", True), (cls, "final", False), (mean, "final", True)):
        variables = initialise(branch, x, (tap,))
        at = evaluate(branch, variables, x, tap)
        assert bool(np.allclose(at.vector, at.map.mean((1, 2)), atol=1e-5)) == is_mean


def test_drop_path_of_a_vision_transformer_draws_from_the_dropout_rng_in_training_only():
    branch, x = SMALL["vit_cls"].clone(depth=2, drop_path=0.9), images()
    taps = ("block1", "block2")
    variables = initialise(branch, x, taps)
    train = jax.jit(lambda key: branch.apply(variables, x, taps=taps, train=True, rngs={"dropout": key}))
    one, other = (train(jax.random.key(seed)) for seed in (0, 1))
    assert (one["block2"].vector != other["block2"].vector).any()
    # The first block is never left out.
    assert (one["block1"].vector == other["block1"].vector).all()
    without = evaluate(branch.clone(drop_path=0.0), variables, x, "block2").vector
    assert (evaluate(branch, variables, x, "block2").vector == without).all()


def test_flops_of_resnet50_are_the_published_ones():
    branch = ResNet.named("resnet50")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 64, 64, 3)), ("stage4",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("stage4",), train=False), variables, x).matmul
    # 4.089 G multiply-adds with the classifier of 2,048 × 1,000 (torchvision's figure for v1.5).
    assert abs(counted / 2 + 2048 * 1000 - 4.089e9) < 2e6


def test_flops_of_vit_b_are_those_of_its_matrices():
    branch, x = ViT.named("vit_b"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 32, 32, 3)), ("final",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("final",), train=False), variables, x).matmul
    n, c = 197, 768
    assert counted / 2 == 196 * 768 * c + 12 * (4 * n * c * c + 2 * n * n * c + 2 * n * c * 4 * c)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: initialise(SMALL["separable"], images(), ("stage9",)), "taps.*stage9.*it has.*stem"),
        (lambda: initialise(SMALL["separable"], images(), ()), "taps"),
        (lambda: initialise(SMALL["separable"], jnp.ones((2, 5)), ("stem",)), "images"),
        (lambda: initialise(SMALL["resnet_patch"], jnp.ones((1, 2, 2, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: initialise(SMALL["mlp"], jnp.ones((2, 5)), ("input",)), "got 5 numbers"),
        (lambda: ResNet.named("resnet1000"), "resnet1000.*resnet18"),
        (lambda: VGG.named("vgg12"), "vgg12.*vgg11"),
        (lambda: ViT.named("vit_xl"), "vit_xl.*vit_b"),
        (lambda: ResNet.named("resnet18", width=-1.0), "positive.*-1"),
        (lambda: initialise(SMALL["vgg"], jnp.ones((1, 3, 3, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: initialise(SMALL["convnet_patch"], jnp.ones((1, 3, 3, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: VGG(blocks=(1,)).feature_info, "width per stage"),
        (lambda: ConvNet(blocks=(1,)).feature_info, "width per stage"),
        (lambda: ConvNet(pool="stride").feature_info, "stride"),
        (lambda: ViT(stem="conv").feature_info, "stem.*conv"),
        (lambda: initialise(SMALL["vit_cls"].clone(heads=3), images(), ("final",)), "3 heads.*8"),
        (lambda: initialise(SMALL["separable"].clone(norm="nrom"), images(), ("stem",)), "nrom"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
