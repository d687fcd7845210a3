"""Geometry of image batches: affine warps, resized windows, and the boxes that move with them.

Coordinates are continuous, y before x, in pixels: the image is [0, H] × [0, W], and the centre of
its first pixel is (½, ½). A matrix [B, 2, 3] takes (y, x, 1) of the old image to (y, x) of the
new one. Every example has its own, and nothing crosses the batch axis, so that a sharded batch
stays where it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def affine_matrix(linear, shift, height: int, width: int):
    """The matrix of a linear map about the centre of the image, then a shift.

    Args:
        linear: floating [B, 2, 2].
        shift: floating [B, 2], in pixels.

    Returns:
        [B, 2, 3].
    """
    y, x = height / 2, width / 2
    stays = jnp.stack([y - linear[:, 0, 0] * y - linear[:, 0, 1] * x, x - linear[:, 1, 0] * y - linear[:, 1, 1] * x], 1)
    return jnp.concatenate([linear, (stays + shift)[..., None]], 2)


def linear_map(degrees, zoom, shear_y, shear_x):
    """Shears, then zooms and rotates; counterclockwise as seen.

    Args:
        degrees, zoom, shear_y, shear_x: floating [B]. `shear_y` moves a point down by so many
            pixels per pixel to the right, `shear_x` right by so many per pixel down.

    Returns:
        [B, 2, 2].

    Example:
        >>> turn = linear_map(*jnp.array([[90.0], [1.0], [0.0], [0.0]]))
        >>> y, x = turn[0] @ jnp.array([0.0, 1.0])  # what points right points up afterwards
        >>> round(float(y), 3), abs(round(float(x), 3))
        (-1.0, 0.0)
    """
    angle = jnp.deg2rad(degrees)
    cos, sin, one = zoom * jnp.cos(angle), zoom * jnp.sin(angle), jnp.ones_like(zoom)
    turn = [[cos, -sin], [sin, cos]]
    shear = [[one, shear_y], [shear_x, one]]
    product = [[sum(turn[i][k] * shear[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1)]
    return jnp.stack([jnp.stack(row, 1) for row in product], 1)


def axis_aligned_matrix(scale_y, scale_x, shift_y, shift_x):
    """The matrix of y → scale_y · y + shift_y, and x likewise; all are floating [B]."""
    zero = jnp.zeros_like(scale_y)
    rows = jnp.stack([scale_y, zero, shift_y], 1), jnp.stack([zero, scale_x, shift_x], 1)
    return jnp.stack(rows, 1)


def invert_matrix(matrix):
    """The matrix [B, 2, 3] of the way back."""
    (a, b, p), (c, d, q) = ([matrix[:, i, j] for j in range(3)] for i in range(2))
    det = a * d - b * c
    rows = [d, -b, b * q - d * p], [-c, a, c * p - a * q]
    return jnp.stack([jnp.stack(row, 1) for row in rows], 1) / det[:, None, None]


def compose_matrices(second, first):
    """The matrix that does what `first` does, then `second`."""
    linear = (second[:, :, :2, None] * first[:, None, :, :2]).sum(2)
    shift = (second[:, :, :2] * first[:, None, :, 2]).sum(2) + second[:, :, 2]
    return jnp.concatenate([linear, shift[..., None]], 2)


def warp(x, matrix, height: int, width: int):
    """Moves every image by its own matrix, by bilinear interpolation.

    Beyond its borders an image goes on as its last row or column. There is no antialiasing: to
    make an image much smaller, use `resized_crop`.

    Args:
        x: [B, H, W, C]; the result is float32 unless `x` is floating.
        matrix: floating [B, 2, 3], old to new coordinates.

    Returns:
        [B, height, width, C].
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    h, w = x.shape[1:3]
    row, column = _source(matrix, height, width)
    row, column = jnp.clip(row - 0.5, 0, h - 1), jnp.clip(column - 0.5, 0, w - 1)
    top, left = jnp.floor(row), jnp.floor(column)
    down, right = ((at - start)[..., None].astype(x.dtype) for at, start in ((row, top), (column, left)))
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)
    below, beside = jnp.minimum(top + 1, h - 1), jnp.minimum(left + 1, w - 1)
    upper = (1 - right) * _pick(x, top, left) + right * _pick(x, top, beside)
    lower = (1 - right) * _pick(x, below, left) + right * _pick(x, below, beside)
    return (1 - down) * upper + down * lower


def warp_nearest(x, matrix, height: int, width: int):
    """As `warp`, for masks [B, H, W] of any dtype: takes the nearest pixel, and 0 beyond the borders."""
    h, w = x.shape[1:3]
    row, column = (jnp.floor(c).astype(jnp.int32) for c in _source(matrix, height, width))
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return jnp.where(inside, _pick(x, jnp.clip(row, 0, h - 1), jnp.clip(column, 0, w - 1)), jnp.zeros((), x.dtype))


def _source(matrix, height, width):
    """float32 [B, height, width] twice: where the centre of each new pixel lay."""
    back = invert_matrix(matrix)[:, None, None]
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    x = jnp.arange(width, dtype=jnp.float32)[None, None] + 0.5
    return (back[..., i, 0] * y + back[..., i, 1] * x + back[..., i, 2] for i in (0, 1))


def _pick(x, row, column):
    """x[b, row[b, …], column[b, …]]; indices lie inside."""
    b, h, w, *rest = x.shape
    flat = x.reshape(b, h * w, *rest)
    at = (row * w + column).reshape(b, -1)
    # One gather per example, from itself alone: fancy indexing over the batch would move a sharded one.
    picked = jax.vmap(lambda one, i: one.at[i].get(mode="promise_in_bounds"))(flat, at)
    return picked.reshape(*row.shape, *rest)


def resized_crop(x, window, height: int, width: int):
    """Resamples a window of every image to one size, antialiased.

    A triangle filter as wide as an output pixel (at least as an input pixel), as two matrix
    products per example: `jax.image.scale_and_translate`. Near the window's edge it also sees
    what lies just beyond, as Pillow's `resize(box=…)` does.

    Args:
        x: floating [B, H, W, C].
        window: floating [B, 4]; y0, x0, y1, x1 in pixels, inside the image.

    Returns:
        [B, height, width, C].
    """
    y0, x0, y1, x1 = window.T
    scale = jnp.stack([height / (y1 - y0), width / (x1 - x0)], 1)
    start = -jnp.stack([y0, x0], 1) * scale

    def one(image, scale, start):
        shape = (height, width, image.shape[2])
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, start, "linear", antialias=True)

    return jax.vmap(one)(x, scale, start)


def window_matrix(window, height: int, width: int):
    """The matrix that `resized_crop` amounts to, for boxes and masks."""
    y0, x0, y1, x1 = window.T
    scale_y, scale_x = height / (y1 - y0), width / (x1 - x0)
    return axis_aligned_matrix(scale_y, scale_x, -y0 * scale_y, -x0 * scale_x)


def random_window(key, share, ratio, height: int, width: int):
    """A window inside the image, anywhere with equal probability.

    Args:
        share: floating [B]; of the image's area. Less where a side would be longer than the image's.
        ratio: floating [B]; width by height.

    Returns:
        floating [B, 4]; y0, x0, y1, x1 in pixels, not rounded.
    """
    area = share * (height * width)
    high, wide = jnp.minimum(jnp.sqrt(area / ratio), height), jnp.minimum(jnp.sqrt(area * ratio), width)
    place = jax.random.uniform(key, (2, *share.shape))
    top, left = place[0] * (height - high), place[1] * (width - wide)
    return jnp.stack([top, left, top + high, left + wide], 1)


def window_mask(window, height: int, width: int):
    """bool [B, height, width]: pixels whose centre lies in the window [B, 4]."""
    y0, x0, y1, x1 = (v[:, None, None] for v in window.T)
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    x = jnp.arange(width, dtype=jnp.float32)[None, None] + 0.5
    return (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1)


def transform_boxes(box, matrix, height: int, width: int):
    """Boxes around what the matrix makes of boxes, cut at the borders of the image.

    Args:
        box: floating [B, 4] or [B, N, 4]; y0, x0, y1, x1 in pixels.
        matrix: floating [B, 2, 3], old to new coordinates.
        height, width: of the new image.

    Returns:
        As `box`. A box that has no area, or that has left the image, is all zeros.

    Example:
        >>> shift = axis_aligned_matrix(*jnp.array([[1.0], [1.0], [-2.0], [3.0]]))
        >>> transform_boxes(jnp.array([[1.0, 1.0, 4.0, 6.0]]), shift, 8, 8)[0].tolist()
        [0.0, 4.0, 2.0, 8.0]
    """
    m = matrix.reshape(matrix.shape[0], *(1,) * (box.ndim - 2), 2, 3)
    y, x = box[..., jnp.array([0, 0, 2, 2])], box[..., jnp.array([1, 3, 1, 3])]
    corner = lambda i, limit: jnp.clip(m[..., i, 0, None] * y + m[..., i, 1, None] * x + m[..., i, 2, None], 0, limit)
    y, x = corner(0, height), corner(1, width)
    new = jnp.stack([y.min(-1), x.min(-1), y.max(-1), x.max(-1)], -1)
    solid = lambda b: (b[..., 2] > b[..., 0]) & (b[..., 3] > b[..., 1])
    return jnp.where((solid(box) & solid(new))[..., None], new, 0.0)
