"""Conformance of every branch: one table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mgjax import ops
from mgjax.branches import (
    MLP,
    NAMED_BRANCHES,
    VGG,
    ConvNet,
    ConvNeXt,
    MobileNetV1,
    MobileNetV2,
    ResNet,
    SeparableNet,
    ViT,
    Xception,
)
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
    "mobilenet_v1": MobileNetV1(widths=(4, 8), blocks=(1, 2), stem_width=4, padding="SAME"),
    "mobilenet_v2": MobileNetV2(
        (4, 8), blocks=(1, 2), expansions=(1, 2), stem_width=4, head_width=16, norm="group", activation=activation("silu")
    ),
    "xception": Xception((1, 2), (4, 8), stem_widths=(4, 4), exit_widths=(8, 8), stem_padding="symmetric", entry_stages=1),
    "xception_group": Xception(
        (1, 1), (4, 8), (4, 4), (8,), stem_stride=1, stem_padding="symmetric", halvings=1, norm="group", remat=True
    ),
    "convnext": ConvNeXt((1, 2), (8, 16), kernel=3, layer_scale=1.0),
    "convnext_cifar": ConvNeXt((1, 1), (4, 8), 2, halvings=0, kernel=3, layer_scale=0.0, norm="batch", remat=True),
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
    # Keras, without its moving statistics.
    "mobilenet_v1": 4_231_976,
    # torchvision.
    "mobilenet_v2": 3_504_872,
    # timm, legacy_xception, and Keras without its moving statistics.
    "xception": 22_855_952,
    # torchvision; with the norm between pooling and classifier, which is the branch's.
    "convnext_t": 28_589_128,
    "convnext_s": 50_223_688,
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
        if isinstance(full, MobileNetV2) and tap == "head":  # as published: below width 1 it keeps its channels
            assert half.feature_info[tap].channels == info.channels == 1280
            continue
        # Half, or where that is no multiple of 8, one beside it.
        assert abs(2 * half.feature_info[tap].channels - info.channels) <= (
            8 if info.channels % 16 and info.channels >= 16 else 0
        )
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


def test_width_multipliers_of_mobilenets_are_the_published_ones():
    channels = lambda branch: [info.channels for info in branch.feature_info.values()]
    assert channels(MobileNetV1.named("mobilenet_v1", width=0.75)) == [24, 48, 96, 192, 384, 768]
    assert channels(MobileNetV2.named("mobilenet_v2", width=0.5)) == [16, 8, 16, 16, 32, 48, 80, 160, 1280]
    assert channels(MobileNetV2.named("mobilenet_v2", width=0.35)) == [16, 8, 8, 16, 24, 32, 56, 112, 1280]
    assert channels(MobileNetV2.named("mobilenet_v2", width=1.4)) == [48, 24, 32, 48, 88, 136, 224, 448, 1792]
    # Keras and timm, without their classifiers of 1,000.
    for branch, count in (
        (MobileNetV1.named("mobilenet_v1", width=0.25), 470_072 - 257_000),
        (MobileNetV2.named("mobilenet_v2", width=0.5), 1_968_680 - 1_281_000),
        (MobileNetV2.named("mobilenet_v2", width=1.4), 6_108_776 - 1_793_000),
    ):
        assert shapes(branch, 64)[1] == count


def test_mobilenets_for_small_images_have_the_known_parameters_and_maps():
    # github.com/kuangliu/pytorch-cifar, with its dense layer for 10 classes. Its MobileNetV2 differs from the paper's: it has
    # 1×1 shortcuts with a norm where a block changes the channels at stride 1, and widens at expansion 1 too.
    v1, v2 = MobileNetV1.named("mobilenet_v1_cifar"), MobileNetV2.named("mobilenet_v2_cifar")
    shortcuts = sum(a * b + 2 * b for a, b in ((32, 16), (16, 24), (64, 96), (160, 320)))
    assert shapes(v1, 32)[1] + 10 * 1024 + 10 == 3_217_226
    assert shapes(v2, 32)[1] + 10 * 1280 + 10 == 2_296_922 - shortcuts - (32 * 32 + 2 * 32)
    assert [info.reduction for info in v1.feature_info.values()] == [1, 1, 2, 4, 8, 16]
    assert [info.reduction for info in v2.feature_info.values()] == [1, 1, 1, 2, 4, 4, 8, 8, 8]


def test_a_mobilenet_can_be_cut_and_have_no_head():
    v1, v2 = MobileNetV1.named("mobilenet_v1"), MobileNetV2.named("mobilenet_v2")
    assert list(v1.clone(widths=v1.widths[:2], blocks=v1.blocks[:2]).feature_info) == ["stem", "stage1", "stage2"]
    cut = v2.clone(widths=v2.widths[:3], blocks=v2.blocks[:3], head_width=None)
    params, _ = shapes(cut, 32)
    assert list(cut.feature_info)[-1] == "stage3" and "stage3_block3" in params and "head" not in params
    assert "expand" not in params["stage1_block1"]


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_rematerialisation_and_the_implementation_change_nothing_of_a_mobilenet(name):
    branch, x = SMALL[name], images()
    tap = list(branch.feature_info)[-1]
    variables = initialise(branch, x, (tap,))

    def gradient(branch):
        loss = lambda params: (evaluate(branch, variables | {"params": params}, x, tap).vector ** 2).sum()
        return jax.tree.leaves(jax.grad(loss)(variables["params"]))

    want = gradient(branch)
    for other in (branch.clone(remat=True), branch.clone(impl="xla")):
        for a, b in zip(gradient(other), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


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


# In multiply-adds, the classifier of 1,000 included: table 4 of Howard et al. 2017, and torchvision's count, which table 4 of
# Sandler et al. 2018 gives as 300 M.
@pytest.mark.parametrize("name, published, digits", [("mobilenet_v1", 569e6, 0.5e6), ("mobilenet_v2", 300.8e6, 0.1e6)])
def test_flops_of_mobilenets_are_the_published_ones(name, published, digits):
    branch, x = NAMED_BRANCHES[name](), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tap = list(branch.feature_info)[-1]
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 64, 64, 3)), (tap,)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=(tap,), train=False), variables, x).matmul
    assert abs(counted / 2 + 1000 * branch.feature_info[tap].channels - published) < digits


def test_flops_of_vit_b_are_those_of_its_matrices():
    branch, x = ViT.named("vit_b"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 32, 32, 3)), ("final",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("final",), train=False), variables, x).matmul
    n, c = 197, 768
    assert counted / 2 == 196 * 768 * c + 12 * (4 * n * c * c + 2 * n * n * c + 2 * n * c * 4 * c)


def test_flops_of_xception_are_those_of_its_convolutions():
    branch, x = Xception.named("xception"), jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 64, 64, 3)), ("exit",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("exit",), train=False), variables, x).matmul
    separable = lambda side, *widths: sum(side**2 * (9 * a + a * b) for a, b in itertools.pairwise(widths))
    stem = 149**2 * 27 * 32 + 147**2 * 288 * 64
    entry = separable(147, 64, 128, 128) + separable(74, 128, 256, 256) + separable(37, 256, 728, 728)
    middle = 8 * separable(19, 728, 728, 728, 728)
    exit_flow = separable(19, 728, 728, 1024) + separable(10, 1024, 1536, 2048)
    shortcuts = 74**2 * 64 * 128 + 37**2 * 128 * 256 + 19**2 * 256 * 728 + 10**2 * 728 * 1024
    assert counted / 2 == stem + entry + middle + exit_flow + shortcuts
    # timm says 8.4 G multiply-adds.
    assert round((counted / 2 + 2048 * 1000) / 1e9, 1) == 8.4


@pytest.mark.parametrize("name, published", [("convnext_t", 4.456e9), ("convnext_s", 8.684e9)])
def test_flops_of_convnext_are_the_published_ones(name, published):
    branch, x = ConvNeXt.named(name), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda: initialise(branch, jnp.ones((1, 32, 32, 3)), ("stage4",)))
    counted = count_flops(lambda v, x: branch.apply(v, x, taps=("stage4",), train=False), variables, x).matmul
    # torchvision's figures, with the classifier.
    assert abs(counted / 2 + 768 * 1000 - published) < 1e6


@pytest.mark.parametrize("name", ["xception_cifar", "convnext_t_cifar", "convnext_s_cifar"])
def test_forms_for_small_images_end_with_a_map_of_4_by_4(name):
    branch = NAMED_BRANCHES[name]()
    taps = tuple(branch.feature_info)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    said = jax.eval_shape(lambda x: branch.init_with_output(jax.random.key(0), x, taps=taps, train=False)[0], images)
    assert {tap: f.map.shape[1] * branch.feature_info[tap].reduction for tap, f in said.items()} == dict.fromkeys(taps, 32)
    assert said[taps[-1]].map.shape[1] == 4


def test_an_xception_without_exit_ends_with_its_last_stage():
    branch = SMALL["xception"].clone(exit_widths=())
    assert list(branch.feature_info) == ["stem", "stage1", "stage2"]
    params, _ = shapes(branch, size=16)
    # The second stage widens in the last convolution of its first block.
    block = params["stage2_block1"]
    assert [block[f"separable{i}"]["pointwise"]["dense"]["kernel"].shape for i in (1, 2)] == [(4, 4), (4, 8)]


def test_the_last_vector_of_a_convnext_is_normalised():
    branch, x = SMALL["convnext"], images()
    variables = initialise(branch, x, ("stage2",))
    features = branch.apply(variables, x, taps=("stage1", "stage2"), train=False)
    np.testing.assert_allclose(features["stage1"].vector, features["stage1"].map.mean((1, 2)), rtol=1e-5, atol=1e-6)
    mean = features["stage2"].map.mean((1, 2))
    normalised = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features["stage2"].vector, normalised, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["xception_group", "convnext", "resnet_cifar"])
def test_drop_path_of_blocks_draws_in_training_only(name):
    branch, x, taps = SMALL[name].clone(drop_path=0.9, norm="group"), images(), ("stage1", "stage2")
    # Blocks that end in a scale of 0 would say nothing yet.
    variables = jax.tree.map(lambda v: v + 0.1, initialise(branch, x, taps[-1:]))
    train = jax.jit(lambda key: branch.apply(variables, x, taps=taps, train=True, rngs={"dropout": key}))
    one, other = (train(jax.random.key(seed)) for seed in (0, 1))
    assert (one["stage2"].map != other["stage2"].map).any()
    # The first block is never left out.
    assert (one["stage1"].map == other["stage1"].map).all()
    without = evaluate(branch.clone(drop_path=0.0), variables, x, "stage2").map
    assert (evaluate(branch, variables, x, "stage2").map == without).all()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: initialise(SMALL["separable"], images(), ("stage9",)), "taps.*stage9.*it has.*stem"),
        (lambda: initialise(SMALL["separable"], images(), ()), "taps"),
        (lambda: initialise(SMALL["separable"], jnp.ones((2, 5)), ("stem",)), "images"),
        (lambda: initialise(SMALL["separable"], jnp.ones((2, 8, 8, 3), jnp.uint8), ("stem",)), "floating images, got uint8"),
        (lambda: initialise(SMALL["resnet_patch"], jnp.ones((1, 2, 2, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: initialise(SMALL["mlp"], jnp.ones((2, 5)), ("input",)), "got 5 numbers"),
        (lambda: ResNet.named("resnet1000"), "resnet1000.*resnet18"),
        (lambda: VGG.named("vgg12"), "vgg12.*vgg11"),
        (lambda: Xception.named("xception71"), "xception71.*xception_cifar"),
        (lambda: ConvNeXt.named("convnext_xl"), "convnext_xl.*convnext_t"),
        (lambda: initialise(SMALL["xception"].clone(stem_padding="VALID"), jnp.ones((1, 6, 6, 3)), ("stem",)), "at least 7"),
        (lambda: Xception(stem_widths=(4,)).feature_info, "two convolutions.*4"),
        (lambda: ConvNeXt(blocks=(1,)).feature_info, "width per stage"),
        (lambda: ViT.named("vit_xl"), "vit_xl.*vit_b"),
        (lambda: ResNet.named("resnet18", width=-1.0), "positive.*-1"),
        (lambda: initialise(SMALL["vgg"], jnp.ones((1, 3, 3, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: initialise(SMALL["convnet_patch"], jnp.ones((1, 3, 3, 3)), ("stage2",)), "at least 4 pixels"),
        (lambda: VGG(blocks=(1,)).feature_info, "width per stage"),
        (lambda: ConvNet(blocks=(1,)).feature_info, "width per stage"),
        (lambda: ConvNet(pool="stride").feature_info, "stride"),
        (lambda: ViT(stem="conv").feature_info, "stem.*conv"),
        (lambda: MobileNetV1(widths=(8,)).feature_info, "width per stage"),
        (lambda: MobileNetV1(strides=(1, 2)).feature_info, "5 stages, but strides for 2"),
        (lambda: MobileNetV2(expansions=(1, 6)).feature_info, "7 stages, but expansions for 2"),
        (lambda: MobileNetV2(padding="VALID").feature_info, "symmetric or SAME, not 'VALID'"),
        (lambda: MobileNetV2.named("mobilenet_v3"), "mobilenet_v3.*mobilenet_v2"),
        (lambda: MobileNetV2.named("mobilenet_v2", width=0), "positive.*0"),
        (lambda: initialise(SMALL["vit_cls"].clone(heads=3), images(), ("final",)), "3 heads.*8"),
        (lambda: initialise(SMALL["separable"].clone(norm="nrom"), images(), ("stem",)), "nrom"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
