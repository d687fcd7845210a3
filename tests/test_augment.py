"""Augmentation on the device, against other libraries, by hand, and over sharded batches."""

import functools
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from mgjax import Batch, config, ops
from mgjax.data import Augment, DataError
from mgjax.data.augment import AugmentConfig
from mgjax.ops import color, policy
from mgjax.train.mesh import batch_sharding, make_mesh, to_device

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "flip": False, "padding": 0}
EVERYTHING = Augment(
    mean=(100.0, 110.0, 120.0),
    std=(50.0, 60.0, 70.0),
    crop=(0.3, 1.0),
    size=12,
    rotate=20.0,
    zoom=0.2,
    shear=0.1,
    jitter=0.3,
    randaugment=(2, 9.0),
    erase=0.5,
    mixup=0.4,
    cutmix=1.0,
)
KEY = jax.random.key(0)


def photo(n=4, size=16, seed=0):
    """Smooth images with a little noise, uint8."""
    rng = np.random.default_rng(seed)
    image = scipy.ndimage.gaussian_filter(rng.normal(size=(n, size, size, 3)), (0, 2, 2, 0)) * 300 + 128
    return np.clip(image + rng.normal(size=image.shape) * 4, 0, 255).astype(np.uint8)


def marked_batch(n=16, size=16, at=(5, 8), side=(2, 4)):
    """Images with a bright rectangle, which is their mask; the box around it."""
    rng = np.random.default_rng(0)
    mask, box = np.zeros((n, size, size), np.uint8), np.zeros((n, 4), np.float32)
    for i in range(n):
        y, x = rng.integers(*at, 2)
        h, w = rng.integers(*side, 2)
        mask[i, y : y + h, x : x + w], box[i] = 1, (y, x, y + h, x + w)
    image = np.repeat(mask[..., None] * np.uint8(200), 3, -1)
    labels = np.arange(n, dtype=np.int32)
    return Batch({"image": image}, {"mask": mask, "box": box, "c": labels}, np.ones(n, bool), labels)


# ---------------------------------------------------------------------- geometry


warp, warp_nearest = (jax.jit(f, static_argnums=(2, 3)) for f in (ops.warp, ops.warp_nearest))
move_boxes = jax.jit(ops.transform_boxes, static_argnums=(2, 3))
compose, invert = jax.jit(ops.compose_matrices), jax.jit(ops.invert_matrix)


@functools.partial(jax.jit, static_argnums=(2, 3))
def matrix(linear, shift, height, width):
    return ops.affine_matrix(ops.linear_map(*linear), shift, height, width)


def matrices(n):
    draw = np.random.default_rng(1).uniform
    linear = np.array([draw(-40, 40, n), draw(0.8, 1.3, n), draw(-0.2, 0.2, n), draw(-0.2, 0.2, n)])
    return np.asarray(matrix(np.float32(linear), np.float32(draw(-3, 3, (n, 2))), 16, 20))


def turn(degrees, n, size):
    return matrix(np.repeat(np.float32([[degrees], [1], [0], [0]]), n, 1), np.zeros((n, 2), np.float32), size, size)


def test_warp_is_scipys_and_opencvs():
    x = np.random.default_rng(0).uniform(0, 255, (4, 16, 20, 3)).astype(np.float32)
    smooth = scipy.ndimage.gaussian_filter(x, (0, 2, 2, 0))
    got, got_smooth = (np.asarray(warp(v, matrices(4), 16, 20)) for v in (x, smooth))
    for i, (linear, shift) in enumerate((m[:, :2], m[:, 2]) for m in matrices(4)):
        # Other libraries count from the centre of the first pixel.
        shift = linear @ [0.5, 0.5] + shift - 0.5
        back = np.linalg.inv(linear)
        for c in range(3):
            expected = scipy.ndimage.affine_transform(x[i, ..., c], back, -back @ shift, order=1, mode="nearest")
            np.testing.assert_allclose(got[i, ..., c], expected, atol=0.02)
        swapped = np.c_[linear[::-1, ::-1], shift[::-1]]  # x before y
        expected = cv2.warpAffine(smooth[i], swapped, (20, 16), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        # OpenCV rounds coordinates to 1/32 pixel.
        assert np.abs(got_smooth[i] - expected).max() < np.abs(np.diff(smooth[i], axis=1)).max() / 8


def test_matrices_compose_and_invert():
    first, second = matrices(3), matrices(3)[::-1]
    whole = lambda m: np.concatenate([np.asarray(m), np.tile([[[0.0, 0.0, 1.0]]], (3, 1, 1))], 1)
    np.testing.assert_allclose(whole(compose(second, first)), whole(second) @ whole(first), atol=1e-4)
    np.testing.assert_allclose(whole(invert(first)), np.linalg.inv(whole(first)), atol=1e-4)
    centre = np.array([8.0, 10.0, 1.0])
    still = matrix(np.float32([[30], [1.2], [0.1], [0.3]]), np.zeros((1, 2), np.float32), 16, 20)
    np.testing.assert_allclose(np.asarray(still)[0] @ centre, centre[:2], atol=1e-4)


def test_a_quarter_turn_is_rot90():
    x = np.arange(2 * 5 * 5 * 1, dtype=np.float32).reshape(2, 5, 5, 1)
    np.testing.assert_allclose(warp(x, turn(90, 2, 5), 5, 5), np.rot90(x, axes=(1, 2)), atol=1e-4)
    mask = x[..., 0].astype(np.int32)
    np.testing.assert_array_equal(warp_nearest(mask, turn(90, 2, 5), 5, 5), np.rot90(mask, axes=(1, 2)))


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (30, 24)])
def test_resized_crop_is_pillows(size):
    x = np.random.default_rng(0).uniform(0, 255, (3, 24, 20, 2)).astype(np.float32)
    window = np.array([[0, 0, 24, 20], [2.3, 4.1, 20.7, 12.9], [10, 0, 24, 11.5]], np.float32)
    got = np.asarray(jax.jit(ops.resized_crop, static_argnums=(2, 3))(x, window, *size))
    for i, (y0, x0, y1, x1) in enumerate(window.tolist()):
        for c in range(2):
            expected = Image.fromarray(x[i, ..., c]).resize(size[::-1], Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
            np.testing.assert_allclose(got[i, ..., c], np.asarray(expected), atol=0.01)


def test_random_windows_have_the_area_and_lie_inside():
    share, ratio = jnp.linspace(0.05, 1.0, 200), jnp.linspace(0.75, 1.33, 200)
    y0, x0, y1, x1 = np.asarray(jax.jit(ops.random_window, static_argnums=(3, 4))(KEY, share, ratio, 20, 30)).T
    assert (y0 >= 0).all() and (x0 >= 0).all() and (y1 <= 20 + 1e-4).all() and (x1 <= 30 + 1e-4).all()
    fits = (y1 - y0 < 19.99) & (x1 - x0 < 29.99)
    np.testing.assert_allclose(((y1 - y0) * (x1 - x0))[fits], 600 * np.asarray(share)[fits], rtol=1e-3)
    np.testing.assert_allclose(((x1 - x0) / (y1 - y0))[fits], np.asarray(ratio)[fits], rtol=1e-3)


def test_boxes_collapse_and_stay_collapsed():
    shift = np.float32([[[1, 0, -6], [0, 1, 0]]])
    boxes = np.float32([[[0, 0, 5, 5], [4, 1, 9, 3], [7, 2, 7, 9], [-1, -1, -1, -1]]])
    moved = np.asarray(move_boxes(boxes, shift, 8, 8))
    np.testing.assert_array_equal(moved[0], [[0, 0, 0, 0], [0, 1, 3, 3], [0, 0, 0, 0], [0, 0, 0, 0]])
    turned = np.asarray(move_boxes(moved, turn(20, 1, 8), 8, 8))
    assert (turned[0, [0, 2, 3]] == 0).all() and (turned[0, 1] != 0).any()


MOVES = {
    "flip": Augment(**PLAIN | {"flip": True}),
    "shift": Augment(**PLAIN | {"padding": 3}),
    "window": Augment(**PLAIN | {"padding": 2}, size=20),
    "crop": Augment(**PLAIN, crop=(0.4, 1.0), size=20),
    "warp": Augment(**PLAIN, rotate=30.0, zoom=0.3, shear=0.1),
    "randaugment": Augment(**PLAIN, randaugment=(2, 8.0)),
    "all": Augment(**PLAIN | {"flip": True}, crop=(0.5, 1.0), rotate=20.0, zoom=0.2),
}


@pytest.mark.parametrize("name", MOVES)
def test_image_box_and_mask_move_together(name):
    """The mask is where the image is bright, and the box is around it."""
    batch = marked_batch(32, size=24, at=(5, 11), side=(6, 9))
    got = jax.jit(MOVES[name])(batch, KEY)
    image, mask, box = np.asarray(got.inputs["image"])[..., 0], np.asarray(got.targets["mask"]), np.asarray(got.targets["box"])
    assert image.shape == mask.shape and mask.dtype == np.uint8 and (box != batch.targets["box"]).any()
    exact, tight = name in ("flip", "shift", "window"), 0
    for i in range(32):
        if mask[i].sum() == 0:
            continue
        y0, x0, y1, x1 = box[i]
        rows, columns = np.flatnonzero(mask[i].any(1)), np.flatnonzero(mask[i].any(0))
        around = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
        room = np.array([around[0] - y0, around[1] - x0, y1 - around[2], x1 - around[3]])
        assert (room > -1).all() and (not exact or (room == 0).all())
        if min(y0, x0) > 0 and y1 < mask.shape[1] and x1 < mask.shape[2]:
            tight += 1
            assert (room < 1.6).all()  # the corner of a turned rectangle holds no centre of a pixel
        bright, marked = image[i] > 100, mask[i] > 0
        if exact:
            np.testing.assert_array_equal(bright, marked)
        elif name != "randaugment":  # which also changes colours
            assert not (scipy.ndimage.binary_erosion(marked) & ~bright).any()
            # An image that was cut goes on beyond its border, and the mask does not.
            assert name == "all" or not (bright & ~scipy.ndimage.binary_dilation(marked)).any()
    assert tight >= 8


@settings(max_examples=25, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    zoom=st.floats(0.6, 1.6),
    shear=st.floats(-0.4, 0.4),
    shift=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    corner=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    side=st.tuples(st.integers(3, 8), st.integers(3, 8)),
)
def test_a_warped_box_holds_the_warped_mask(degrees, zoom, shear, shift, corner, side):
    mask = np.zeros((1, 20, 20), np.int32)
    (y, x), (h, w) = corner, side
    mask[0, y : y + h, x : x + w] = 1
    move = matrix(np.float32([[degrees], [zoom], [shear], [-shear / 2]]), np.float32([shift]), 20, 20)
    moved = np.asarray(warp_nearest(mask, move, 20, 20))[0]
    y0, x0, y1, x1 = np.asarray(move_boxes(np.float32([[y, x, y + h, x + w]]), move, 20, 20))[0]
    at = np.argwhere(moved) + 0.5
    assert ((at >= [y0 - 1e-3, x0 - 1e-3]) & (at <= [y1 + 1e-3, x1 + 1e-3])).all()


def test_several_boxes_per_image():
    batch = marked_batch()
    several = np.stack([batch.targets["box"], np.zeros((16, 4), np.float32), batch.targets["box"] + [[0, 0, 1, 1]]], 1)
    augment = jax.jit(MOVES["warp"])
    got = augment(batch, KEY).targets["box"]
    of_many = augment(batch.replace(targets={"box": jnp.asarray(several, jnp.float32)}), KEY).targets["box"]
    np.testing.assert_array_equal(of_many[:, 0], got)
    assert of_many.shape == (16, 3, 4) and (of_many[:, 1] == 0).all() and (of_many[:, 2] != got).any()


# ---------------------------------------------------------------------- colours

PILLOW = {
    "autocontrast": (lambda x: color.autocontrast(x), lambda i: ImageOps.autocontrast(i)),
    "equalize": (lambda x: color.equalize(x), lambda i: ImageOps.equalize(i)),
    "posterize": (lambda x: color.posterize(x, jnp.full(4, 3)), lambda i: ImageOps.posterize(i, 3)),
    "solarize": (lambda x: color.solarize(x, jnp.full(4, 100.0)), lambda i: ImageOps.solarize(i, 100)),
    "grey": (lambda x: jnp.broadcast_to(color.grey(x), x.shape), lambda i: i.convert("L").convert("RGB")),
    **{
        f"{ours} {factor}": (
            lambda x, f=factor, op=ours: getattr(color, op)(x, jnp.full(4, f)),
            lambda i, f=factor, op=theirs: getattr(ImageEnhance, op)(i).enhance(f),
        )
        for ours, theirs in {
            "brightness": "Brightness",
            "contrast": "Contrast",
            "saturation": "Color",
            "sharpness": "Sharpness",
        }.items()
        for factor in (0.1, 1.9)
    },
}


@pytest.mark.parametrize("name", PILLOW)
def test_colors_are_pillows_up_to_rounding(name):
    x = photo()
    x[0] = x[0] // 2 + 40  # something to stretch
    x[1, ..., 0] = 7  # a channel of a single value
    ours, theirs = PILLOW[name]
    got = np.asarray(jax.jit(ours)(x.astype(np.float32)))
    expected = np.stack([np.asarray(theirs(Image.fromarray(one))) for one in x]).astype(np.float32)
    exact = name in ("equalize", "posterize", "solarize")
    # Pillow rounds the grey image, its mean and the result, each by less than one level.
    np.testing.assert_allclose(got, expected, atol=0 if exact else 2.0)
    assert np.abs(got - expected).mean() < 1 and (exact or np.abs(got - x).max() > 2)


def test_solarize_add_by_hand():
    x = jnp.array([0.0, 100.0, 127.0, 128.0, 250.0]).reshape(1, 1, 5, 1)
    np.testing.assert_array_equal(color.solarize_add(x, jnp.array([60.0])).ravel(), [60, 160, 187, 128, 250])


def test_sharpness_of_a_tiny_image_and_equalize_of_few_pixels():
    one = jnp.asarray(photo(1, 1), jnp.float32)
    np.testing.assert_array_equal(color.sharpness(one, jnp.array([0.1, 1.9])), one)
    x = jnp.asarray(photo(2, 2), jnp.float32)
    np.testing.assert_array_equal(jax.jit(color.sharpness)(x, jnp.array([0.1, 1.9])), x)  # all of it is border
    np.testing.assert_array_equal(jax.jit(color.equalize)(x), x)  # too few pixels for a step, as in Pillow


def test_each_row_of_randaugment_gets_its_own_operations():
    n = 64
    image = np.repeat(photo(1), n, 0)
    batch = Batch({"image": image}, {}, np.ones(n, bool), np.arange(n))
    got = np.asarray(jax.jit(Augment(**PLAIN, randaugment=(1, 9.0)))(batch, KEY).inputs["image"])
    kinds = {row.tobytes() for row in np.round(got)}
    assert 12 <= len(kinds) <= 25  # operations with and without a sign
    assert got.min() >= 0 and got.max() <= 255
    chosen, sign = policy.draw_policy(KEY, 2, 3000)
    counts = np.bincount(np.asarray(chosen).ravel(), minlength=len(policy.OPERATIONS))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3 and set(np.unique(sign)) == {-1.0, 1.0}


def test_randaugment_applies_what_it_chose():
    """One row per operation, against the operations by themselves."""
    n, m = len(policy.OPERATIONS), 0.6
    x, one = jnp.asarray(np.repeat(photo(1), n, 0), jnp.float32), jnp.ones(1)
    chosen, sign = jnp.arange(n)[None], jnp.ones((1, n))
    got = dict(zip(policy.OPERATIONS, jax.jit(policy.policy_colors, static_argnums=3)(x, chosen, sign, m)))
    alone = lambda x: {
        "autocontrast": color.autocontrast(x),
        "equalize": color.equalize(x),
        "posterize": color.posterize(x, 6 * one),
        "solarize": color.solarize(x, 256 * 0.4 * one),
        "solarize_add": color.solarize_add(x, 66 * one),
        **{f: getattr(color, f)(x, 1.54 * one) for f in ("saturation", "contrast", "brightness", "sharpness")},
    }
    expected = jax.jit(alone)(x[:1])
    for name, image in got.items():
        np.testing.assert_allclose(image, expected.get(name, x)[0], atol=1e-2, err_msg=name)
    map_of = jax.jit(policy.policy_matrix, static_argnums=(2, 3, 4))
    moved = dict(zip(policy.OPERATIONS, np.asarray(map_of(chosen, sign, m, 16, 20))))
    np.testing.assert_allclose(moved["translate_x"], [[1, 0, 0], [0, 1, 0.27 * 20]], rtol=1e-5)
    np.testing.assert_allclose(moved["shear_y"][:, :2], [[1, 0.18], [0, 1]], rtol=1e-5)
    assert moved["rotate"][0, 0] == pytest.approx(np.cos(np.deg2rad(18)))
    assert (moved["contrast"] == [[1, 0, 0], [0, 1, 0]]).all()
    both = map_of(jnp.array([[1], [5]]), jnp.ones((2, 1)), m, 16, 20)[0]
    np.testing.assert_allclose(both[:, 2] - moved["rotate"][:, 2], [0, 0.27 * 20], atol=1e-4)


# ---------------------------------------------------------------------- erasing and mixing


def test_erasing_fills_a_window_with_the_mean():
    batch = Batch({"image": photo(64)}, {}, np.ones(64, bool), np.arange(64))
    mean = (3.5, 2.5, 1.5)  # no whole level, so that no pixel has it by chance
    rows = np.asarray(jax.jit(Augment(**PLAIN | {"mean": mean}, erase=0.5))(batch, KEY).inputs["image"])
    erased = (rows == 0).all(-1)
    assert 16 < erased.any((1, 2)).sum() < 48
    for where, row, image in zip(erased, rows, batch.inputs["image"]):
        np.testing.assert_array_equal(row[~where], (image - np.float32(mean))[~where])
        y, x = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        assert where.sum() == len(y) * len(x) <= 0.4 * 256


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_symmetric_beta(alpha):
    drawn = np.asarray(jax.jit(ops.symmetric_beta, static_argnums=(1, 2))(KEY, alpha, 4000), np.float64)
    assert np.isfinite(drawn).all() and drawn.min() >= 0 and drawn.max() <= 1
    # As Kolmogorov and Smirnov, but not so near 0 and 1 that float32 ends.
    at = np.linspace(1e-4, 1 - 1e-4, 999)
    below = (drawn[:, None] <= at[None]).mean(0)
    assert np.abs(below - scipy.stats.beta(alpha, alpha).cdf(at)).max() < 1.95 / np.sqrt(4000)


def one_value_each(n=16, size=9):
    image = np.broadcast_to(3 * np.arange(n, dtype=np.uint8)[:, None, None, None], (n, size, size, 3))
    return Batch({"image": image}, {"c": np.arange(n, dtype=np.int32)}, np.ones(n, bool), np.arange(n))


def test_mixup_says_what_it_mixed():
    batch = one_value_each()
    got = jax.jit(Augment(**PLAIN, mixup=1.0))(batch, KEY)
    np.testing.assert_array_equal(got.targets["c"], np.arange(16))
    np.testing.assert_array_equal(got.partner["c"], np.arange(16) ^ 1)
    share = np.asarray(got.share)
    assert share.shape == (16,) and len(set(share)) == 16
    expected = 3 * (share * np.arange(16) + (1 - share) * (np.arange(16) ^ 1))
    np.testing.assert_allclose(got.inputs["image"], np.broadcast_to(expected[:, None, None, None], (16, 9, 9, 3)), atol=1e-3)


@pytest.mark.parametrize("size", [9, 16])
def test_cutmix_counts_its_pixels(size):
    got = jax.jit(Augment(**PLAIN, cutmix=1.0))(one_value_each(64, size), KEY)
    own = np.asarray(got.inputs["image"])[..., 0] == 3 * np.arange(64)[:, None, None]
    np.testing.assert_allclose(got.share, own.mean((1, 2)), atol=1e-6)
    assert ((np.asarray(got.inputs["image"])[..., 0] == 3 * (np.arange(64) ^ 1)[:, None, None]) | own).all()
    for window in ~own:
        assert window.sum() == window.any(0).sum() * window.any(1).sum()
    assert 0.35 < np.mean(got.share) < 0.85


def test_mixup_and_cutmix_take_turns_and_strength_spares_rows():
    both = jax.jit(Augment(**PLAIN, mixup=1.0, cutmix=1.0), static_argnums=2)
    rows = np.asarray(both(one_value_each(64), KEY).inputs["image"])[..., 0].reshape(64, -1)
    pure = [set(row) <= {3.0 * i, 3.0 * (i ^ 1)} for i, row in enumerate(rows)]
    assert 16 < sum(pure) < 48
    share = np.asarray(both(one_value_each(64), KEY, 0.25).share)
    assert 0.6 < (share == 1).mean() < 0.9


def test_masked_rows_are_mixed_with_nothing():
    batch = one_value_each()
    mask = np.arange(16) != 5
    labels = np.where(mask, batch.targets["c"], -1)
    augment = jax.jit(Augment(**PLAIN, mixup=1.0, cutmix=1.0))
    got = augment(batch.replace(mask=mask, targets={"c": labels}), KEY)
    np.testing.assert_array_equal(got.share[4:6], 1.0)
    np.testing.assert_array_equal(got.inputs["image"][4], batch.inputs["image"][4])
    assert got.partner["c"][4] == -1 and (np.asarray(got.share) < 1).sum() > 8


def test_without_mixing_a_batch_has_the_leaves_that_it_had():
    batch = one_value_each()
    got = Augment(**PLAIN, jitter=0.1)(batch, KEY)
    assert jax.tree.structure(got) == jax.tree.structure(batch) and got.share is None and got.partner == {}


# ---------------------------------------------------------------------- the whole


def test_strength_zero_is_normalisation_alone():
    for augment in (EVERYTHING, Augment((100.0,) * 3, (50.0,) * 3)):
        batch = marked_batch()
        got, expected = augment(batch, KEY, 0.0), augment.normalise(batch)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert got.inputs["image"].dtype == jnp.float32
    np.testing.assert_allclose(got.inputs["image"], (batch.inputs["image"] - 100.0) / 50.0)


def test_evaluation_sees_the_centre():
    batch = marked_batch()
    got = Augment(**PLAIN, size=10).normalise(batch)
    np.testing.assert_array_equal(got.inputs["image"], batch.inputs["image"][:, 3:13, 3:13])
    np.testing.assert_array_equal(got.targets["mask"], batch.targets["mask"][:, 3:13, 3:13])
    np.testing.assert_array_equal(got.targets["box"], np.clip(batch.targets["box"] - 3, 0, 10))
    # A shift moves the same window.
    moved = Augment(**PLAIN | {"padding": 2}, size=10)(batch, KEY).inputs["image"]
    windows = [batch.inputs["image"][:, y : y + 10, x : x + 10] for y in range(1, 6) for x in range(1, 6)]
    same = [[(moved[i] == window[i]).all() for window in windows] for i in range(16)]
    assert np.any(same, 1).all() and not np.asarray(same)[:, 12].all()


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_shapes_do_not_depend_on_the_strength(strength):
    got = jax.eval_shape(lambda b, k: EVERYTHING(b, k, strength), marked_batch(), KEY)
    assert got.inputs["image"].shape == (16, 12, 12, 3) and got.inputs["image"].dtype == jnp.float32
    assert got.targets["mask"].shape == (16, 12, 12) and got.targets["box"].shape == (16, 4)


def test_less_strength_changes_less():
    batch = Batch({"image": photo(32)}, {}, np.ones(32, bool), np.arange(32))
    for changes in ({"rotate": 40.0, "zoom": 0.5, "shear": 0.4}, {"jitter": 0.9}, {"crop": (0.2, 0.5)}):
        augment = jax.jit(Augment(**PLAIN, **changes), static_argnums=2)
        far = [np.abs(augment(batch, KEY, s).inputs["image"] - batch.inputs["image"]).mean() for s in (0.1, 1.0)]
        assert 0 < far[0] < 0.6 * far[1], changes


def test_augmentation_depends_on_its_key_alone():
    augment = jax.jit(Augment(**PLAIN | {"flip": True, "padding": 2}, erase=0.5, mixup=0.4, cutmix=1.0))
    draw = lambda seed: jax.tree.leaves(augment(marked_batch(), jax.random.key(seed)))
    for a, b in zip(draw(1), draw(1)):
        np.testing.assert_array_equal(a, b)
    assert (draw(1)[0] != draw(2)[0]).any()


def test_jit_is_eager():
    augment = Augment(**PLAIN | {"flip": True, "padding": 2}, rotate=20.0)
    batch = marked_batch(4)
    for eager, jitted in zip(*(jax.tree.leaves(f(batch, KEY)) for f in (augment, jax.jit(augment)))):
        np.testing.assert_allclose(eager, jitted, atol=0.01, rtol=1e-4)


def collectives(compiled) -> set[str]:
    return set(re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", compiled.as_text()))


@pytest.mark.parametrize("augment", [Augment((90.0,) * 3, (60.0,) * 3), EVERYTHING], ids=["default", "everything"])
def test_a_sharded_batch_stays_where_it_is(augment):
    """No device sends anything to another, and the result is that of one device."""
    batch, mesh = marked_batch(), make_mesh()
    placed = to_device(batch, mesh)
    compiled = jax.jit(augment).lower(placed, KEY).compile()
    assert collectives(compiled) == set()
    got, expected = compiled(placed, KEY), jax.jit(augment)(batch, KEY)
    assert all(x.sharding.is_equivalent_to(batch_sharding(mesh), x.ndim) for x in jax.tree.leaves(got))
    for ours, alone in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        # Some operations have thresholds, about which a rounding error decides.
        assert np.isclose(ours, alone, rtol=1e-4, atol=1e-3).mean() > 0.995


def test_what_crosses_devices_is_seen():
    """The test above can fail: pairs that lie across devices, or a permutation, send something."""
    x = to_device(marked_batch(8).inputs["image"], make_mesh())
    assert collectives(jax.jit(ops.swap_pairs).lower(x).compile())
    assert collectives(jax.jit(lambda x: jax.random.permutation(KEY, x)).lower(x).compile())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"padding": -1}, "augment.padding is -1; it is at least 0"),
        ({"mixup": -0.1}, "augment.mixup is -0.1"),
        ({"erase": 1.5}, "augment.erase is 1.5; it lies between 0 and 1"),
        ({"crop": (1.0, 0.3)}, r"augment.crop is \(1.0, 0.3\); two shares .* smallest <= largest"),
        ({"crop": (0.3,)}, "two shares are needed"),
        ({"size": 0}, "augment.size is 0"),
        ({"randaugment": (0, 9.0)}, "augment.randaugment"),
        ({"randaugment": (2, 11.0)}, "magnitude, 0 to 10"),
    ],
)
def test_values_that_make_no_augmentation(changes, says):
    with pytest.raises(DataError, match=says):
        Augment(**PLAIN | changes)


def test_batches_that_do_not_fit():
    with pytest.raises(DataError, match="3 cannot be paired; use an even batch size"):
        Augment(**PLAIN, mixup=0.2)(marked_batch(3), KEY)
    with pytest.raises(ValueError, match="3 rows cannot be paired"):
        ops.swap_pairs(jnp.zeros(3))
    for call in (lambda a: a(marked_batch(), KEY), lambda a: a.normalise(marked_batch())):
        with pytest.raises(DataError, match="augment.size is 20; the images are only 16 × 16"):
            call(Augment(**PLAIN, size=20))
    with pytest.raises(DataError, match="strength of the augmentation is 2.0"):
        Augment(**PLAIN)(marked_batch(), KEY, 2.0)


def test_a_config_becomes_an_augmentation():
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert Augment.from_config(AugmentConfig(), mean, std, (32, 32, 3)) == Augment(mean, std)
    given_ = {"crop": (0.08, 1.0), "size": 28, "layers": 2, "magnitude": 7.0, "mixup": 0.2, "flip": False}
    chosen = config.override(AugmentConfig(), given_)
    expected = Augment(mean, std, flip=False, crop=(0.08, 1.0), size=28, randaugment=(2, 7.0), mixup=0.2)
    assert Augment.from_config(chosen, mean, std, (32, 32, 3)) == expected
    with pytest.raises(DataError, match="the images are only 24 × 32"):
        Augment.from_config(chosen, mean, std, (24, 32, 3))
    with pytest.raises(config.ConfigError, match="erase is 2"):
        config.override(AugmentConfig(), {"erase": 2.0})


def test_pieces_come_last_and_leave_their_pixels():
    batch = Batch({"image": photo(32)}, {}, np.ones(32, bool), np.arange(32))
    augment, key = Augment((100.0,) * 3, (50.0,) * 3, padding=2), jax.random.key(4)
    whole, cut = augment(batch, key), augment(batch, key, 1.0, 4)
    sort = lambda image: np.sort(np.asarray(image).reshape(32, -1), 1)
    np.testing.assert_array_equal(sort(whole.inputs["image"]), sort(cut.inputs["image"]))
    assert (np.asarray(whole.inputs["image"]) != np.asarray(cut.inputs["image"])).any()
    with pytest.raises(DataError, match="cannot be cut into 5 pieces a side"):
        augment(batch, key, 1.0, 5)


def test_what_is_mixed_in_brings_what_it_counts_and_where_it_lies():
    batch = Batch({"image": photo(4)}, {"c": np.arange(4)}, np.ones(4, bool), np.arange(4) + 10)
    batch = batch.replace(weights={"g": np.float32([1, 0, 2, 3])})
    mixed = Augment((100.0,) * 3, (50.0,) * 3, mixup=1.0)(batch, jax.random.key(0))
    assert mixed.partner["c"].tolist() == [1, 0, 3, 2] and mixed.partner_index.tolist() == [11, 10, 13, 12]
    assert mixed.partner_weights["g"].tolist() == [0, 1, 3, 2] and mixed.weights["g"].tolist() == [1, 0, 2, 3]
