import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from mgjax import Granularity, Head, MultiGranularityModel, Task, ops
from mgjax.branches import ResNet
from mgjax.flops import count_flops
from mgjax.granularity import Compose, DeclarationError, Denoise, Grey, Identity, Region, Resize
from mgjax.layers import SeparableConv
from mgjax.views import apply_view


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


def test_views_follow_each_other():
    noise = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    seen = lambda view, resolution=1.0: apply_view({"image": noise}, view, resolution)
    corner = Region(0.5, 0.0, 0.25, 1.0)
    np.testing.assert_array_equal(seen(corner), noise[:, 16:24])
    np.testing.assert_array_equal(seen(Region.central(0.5)), noise[:, 8:24, 8:24])
    chain = Compose((corner, Compose((Denoise("median"), Identity())), Resize(0.5)))
    assert chain.views == (corner, Denoise("median"), Identity(), Resize(0.5))
    np.testing.assert_array_equal(seen(chain), ops.resize(ops.median(noise[:, 16:24], 3), 4, 16))
    # The resolution is taken last, whether or not there is a Resize to join it.
    np.testing.assert_array_equal(seen(chain, 0.5), ops.resize(ops.median(noise[:, 16:24], 3), 2, 8))
    np.testing.assert_array_equal(seen(corner, 0.5), ops.resize(noise[:, 16:24], 4, 16))
    np.testing.assert_array_equal(seen(Compose((Resize(0.5), corner))), ops.resize(noise, 16, 16)[:, 8:12])
    np.testing.assert_array_equal(seen(Compose(())), noise)
    grey = seen(Grey())
    assert grey.shape == noise.shape and (grey[..., 0] == grey[..., 2]).all()
    np.testing.assert_allclose(grey[..., 0], noise @ jnp.array([0.299, 0.587, 0.114]), atol=1e-5)
    with pytest.raises(ValueError, match="needs an image"):
        apply_view({"text": noise}, Compose((Identity(), Grey())))
    with pytest.raises(ValueError, match="grey is no view"):
        seen("grey")


@pytest.mark.parametrize(
    "view, same",
    [
        (Denoise("median", 5), lambda x: ops.median(x, 5)),
        (Denoise("bilateral", 5, strength=0.7, reach=1.5), lambda x: ops.bilateral(x, 5, 0.7, 1.5)),
        (Denoise("bilateral", 3), lambda x: ops.bilateral(x, 3, 0.5, 1.0)),
        (Denoise("nlm", 3, strength=0.7, noise=0.2), lambda x: ops.non_local_means(x, 3, 7, 0.7, 0.2)),
        (Denoise("nlm", 5, reach=3), lambda x: ops.non_local_means(x, 5, 3, 0.5)),
    ],
)
def test_a_view_denoises(view, same):
    noise = 0.3 * jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    got = jax.jit(lambda x: apply_view({"image": x}, view))(noise)
    np.testing.assert_allclose(got, jax.jit(same)(noise), rtol=1e-5, atol=1e-6)
    assert got.std() < 0.95 * noise.std() and hash(view) == hash(dataclasses.replace(view))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Denoise("mean"), "one of median, bilateral, nlm"),
        (lambda: Denoise("median", size=4), "3, 5 or 7"),
        (lambda: Denoise("bilateral", strength=0.0), "strength lies above 0"),
        (lambda: Denoise("nlm", reach=4), "search window of non-local means is odd"),
        (lambda: Region(0.5, 0.0, 0.6, 1.0), "inside the image"),
        (lambda: Region.central(0.0), "inside the image"),
        (lambda: Resize(0.5, detail=0.6), "detail <= scale"),
    ],
)
def test_declarations_of_no_view(make, says):
    with pytest.raises(DeclarationError, match=says):
        make()


def test_a_granularity_has_its_own_preprocessing():
    """Two views of one branch: the same parameters, other features."""
    model = MultiGranularityModel(
        [
            Granularity("sharp", "trunk", "stage1"),
            Granularity("smooth", "trunk", "stage1", view=Compose((Region.central(0.5), Denoise("median")))),
        ],
        [Task("a", "a", 2), Task("b", "b", 2)],
        [Head("a", {"sharp": "grad"}), Head("b", {"smooth": "grad"})],
        {"trunk": ResNet(blocks=(1,), widths=(4,), stem="cifar")},
    )
    inputs = {"image": jax.random.normal(jax.random.key(1), (2, 16, 16, 3))}
    variables = model.init(jax.random.key(0), inputs, model.everything, train=False)
    features = model.apply(variables, inputs, model.everything, train=False, method="features")
    assert features["sharp"].map.shape == (2, 16, 16, 4) and features["smooth"].map.shape == (2, 8, 8, 4)


# ---------------------------------------------------------------------- denoising

NOISY = np.clip(
    scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 14, 15, 3)), (0, 2, 2, 0)) * 300
    + np.random.default_rng(1).normal(size=(2, 14, 15, 3)) * 20
    + 128,
    0,
    255,
).astype(np.uint8)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_median_is_opencvs(size):
    got = jax.jit(ops.median, static_argnums=1)(jnp.asarray(NOISY, jnp.float32), size)
    np.testing.assert_array_equal(got, np.stack([cv2.medianBlur(image, size) for image in NOISY]))


def surrounded(image, border):
    """As our operations see an image: beyond its borders the last row or column goes on."""
    return np.pad(image, ((border, border), (border, border), (0, 0)), mode="edge")


def test_bilateral_is_opencvs_on_one_channel():
    """OpenCV's window is round: with this σ the corners of ours have next to no weight."""
    x = NOISY[..., :1] / np.float32(255)
    for image, ours in zip(x, ops.bilateral(x, 7, 0.2, 0.8)):
        theirs = cv2.bilateralFilter(surrounded(image, 3), 7, 0.2, 0.8)[3:-3, 3:-3]
        np.testing.assert_allclose(ours[..., 0], theirs, atol=2e-3)  # it reads its weights from a table


def test_bilateral_by_hand():
    """Of colours, at the last pixel."""
    x, sigma = NOISY[0] / np.float32(255), 0.3
    wide, at = surrounded(x, 1), [(i, j) for i in (0, 1, 2) for j in (0, 1, 2)]
    near = {(i, j): wide[13 + i, 14 + j] for i, j in at}
    space = {(i, j): np.exp(-((i - 1) ** 2 + (j - 1) ** 2) / (2 * 1.2**2)) for i, j in at}
    weight = {p: space[p] * np.exp(-((near[p] - near[1, 1]) ** 2).sum() / (2 * sigma**2)) for p in at}
    expected = sum(weight[p] * near[p] for p in at) / sum(weight.values())
    np.testing.assert_allclose(ops.bilateral(x[None], 3, sigma, 1.2)[0, 13, 14], expected, rtol=1e-4)


@pytest.mark.parametrize("size, search", [(3, 5), (5, 7)])
def test_non_local_means_is_opencvs(size, search):
    border = search // 2 + size // 2
    for image, ours in zip(NOISY, ops.non_local_means(NOISY.astype(np.float32), size, search, 40.0)):
        theirs = cv2.fastNlMeansDenoising(
            surrounded(image, border), h=[40.0], templateWindowSize=size, searchWindowSize=search, normType=cv2.NORM_L2
        )
        # It rounds to whole levels.
        np.testing.assert_allclose(ours, theirs[border:-border, border:-border].astype(np.float32), atol=1.0)
        assert np.abs(ours - image).mean() > 10


def test_non_local_means_by_hand():
    """With noise that is expected, at a corner."""
    x, h, noise = NOISY[0] / np.float32(255), 0.2, 0.1
    wide = surrounded(x, 2)
    patch = lambda i, j: wide[i + 1 : i + 4, j + 1 : j + 4]
    near = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    distances = [((patch(0, 0) - patch(*at)) ** 2).mean() for at in near]
    weights = [np.exp(-max(d - 2 * noise**2, 0) / h**2) for d in distances]
    expected = sum(w * wide[2 + i, 2 + j] for w, (i, j) in zip(weights, near)) / sum(weights)
    np.testing.assert_allclose(ops.non_local_means(x[None], 3, 3, h, noise)[0, 0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x: ops.median(x, 4), "median: size is 4; it is odd"),
        (lambda x: ops.median(x, 9), "above 7"),
        (lambda x: ops.bilateral(x, 1), "size is 1"),
        (lambda x: ops.bilateral(x, 3, 0.0), "sigma_color is 0.0"),
        (lambda x: ops.non_local_means(x, 3, 6), "search is 6"),
        (lambda x: ops.non_local_means(x, strength=-1.0), "strength is -1.0"),
    ],
)
def test_denoising_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(jnp.ones((1, 8, 8, 1)))


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


# ---------------------------------------------------------------------- pieces


def test_pieces_are_whole_and_every_image_has_an_order_of_its_own():
    images = jnp.arange(3 * 6 * 4.0).reshape(3, 6, 4, 1)
    same = jnp.broadcast_to(images[:1], (3, 6, 4, 1))
    got = np.asarray(ops.jigsaw(jax.random.key(1), same, 2))
    pieces = lambda image: {image[i : i + 3, j : j + 2].tobytes() for i in (0, 3) for j in (0, 2)}
    for image in got:
        assert pieces(image) == pieces(np.asarray(same[0]))
    assert len({image.tobytes() for image in got}) > 1
    np.testing.assert_array_equal(ops.jigsaw(jax.random.key(1), images, 1), images)
    with pytest.raises(ValueError, match="cannot be cut into 4 pieces"):
        ops.jigsaw(jax.random.key(1), images, 4)


def test_every_order_of_pieces_comes_up_alike():
    image = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 2, 2, 1), (4800, 2, 2, 1))
    orders, counts = np.unique(np.asarray(ops.jigsaw(jax.random.key(0), image, 2)).reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24 and (abs(counts - 200) < 5 * np.sqrt(200)).all()
