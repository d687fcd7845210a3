"""Resampling of image batches [B, H, W, C]: resize, windows, flip, space to depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def resize(x, height: int, width: int):
    """Resizes with antialiasing: means over whole blocks where they fit, else a triangle filter.

    Args:
        x: floating [B, H, W, C].

    Returns:
        [B, height, width, C] in the dtype of `x`.

    Example:
        >>> resize(jnp.ones((1, 8, 8, 3)), 2, 2).shape
        (1, 2, 2, 3)
    """
    b, h, w, c = x.shape
    if (h, w) == (height, width):
        return x
    if h % height == 0 and w % width == 0:
        return x.reshape(b, height, h // height, width, w // width, c).mean((2, 4))
    return jax.image.resize(x, (b, height, width, c), "linear", antialias=True)


def crop(x, top, left, height: int, width: int):
    """Cuts a window out of every image, each at its own place.

    Args:
        x: [B, H, W, ...].
        top, left: int [B]; the window's upper left corner. The window must lie inside.

    Returns:
        [B, height, width, ...].
    """
    # One slice per example: fancy indexing would gather a batch that is sharded.
    cut = lambda one, y, x: jax.lax.dynamic_slice(one, (y, x) + (0,) * (one.ndim - 2), (height, width, *one.shape[2:]))
    return jax.vmap(cut)(x, top, left)


def center_crop(x, height: int, width: int):
    """The central window of every image; rounds up and left.

    Args:
        x: [B, H, W, ...], with H at least `height` and W at least `width`.

    Returns:
        [B, height, width, ...].
    """
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def flip(x, where):
    """Mirrors left and right in the images where `where` (bool [B]) holds. x: [B, H, W, ...]."""
    return jnp.where(where.reshape((-1,) + (1,) * (x.ndim - 1)), jnp.flip(x, 2), x)


def space_to_depth(x, block: int):
    """Moves blocks of block × block pixels into channels.

    Args:
        x: [B, H, W, C], with H and W multiples of `block`.

    Returns:
        [B, H/block, W/block, block²·C].

    Raises:
        ValueError: a size that the block does not divide.
    """
    b, h, w, c = x.shape
    if h % block or w % block:
        raise ValueError(f"space_to_depth: {block} does not divide the size of {x.shape}")
    x = x.reshape(b, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // block, w // block, block * block * c)
